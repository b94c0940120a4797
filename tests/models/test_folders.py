"""A model takes the place of a model and of nothing else; what lies beside it stays."""

import jax
import pytest

from experiments import export
from gtalign_jax.config import writable_directory
from gtalign_jax.errors import UserError
from gtalign_jax.files import local
from gtalign_jax.models import hf, transformer
from gtalign_jax.models.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4
)


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(jax.random.key(0), MODEL)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_run(folder):
    """Files of a run, with a config.json of their own."""
    for name in ("config.json", "metrics.jsonl", "checkpoints/align/1/state", "hf/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("place", ["run", ".", "run/hf", "run/config.json", "dangling"])
def test_export_onto_what_is_not_an_export_is_refused_and_loses_nothing(
    tmp_path, monkeypatch, capsys, place, overwrite
):
    run = make_run(tmp_path / "run")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    monkeypatch.chdir(run if place == "." else tmp_path)
    with pytest.raises(SystemExit) as stop:
        export.main([f"--checkpoint={run / 'checkpoints'}", f"--out={place}", *overwrite])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --out=")
    assert contents(tmp_path) == before


def test_export_onto_an_export_needs_overwrite(tmp_path, params, capsys):
    hf.save_params(params, MODEL, tmp_path / "hf")
    with pytest.raises(SystemExit):
        export.main([f"--checkpoint={tmp_path / 'checkpoints'}", f"--out={tmp_path / 'hf'}"])
    assert "--overwrite replaces it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export.main([f"--checkpoint={tmp_path / 'checkpoints'}", f"--out={tmp_path / 'hf'}", "--overwrite"])
    assert "no work directory of a run" in capsys.readouterr().err  # the folder is not what is wrong


def test_a_model_is_not_saved_over_a_run_or_a_file(tmp_path, params):
    run = make_run(tmp_path / "run")
    before = contents(run)
    for place, message in ((run, "holds checkpoints and no model"), (run / "config.json", "is no folder")):
        with pytest.raises(UserError, match=message):
            hf.save_params(params, MODEL, place)
    assert contents(run) == before and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_neighbours_and_other_files_of_a_model_stay_when_it_is_replaced(tmp_path, params):
    for name in ("hf.old", "hf.incomplete", ".hf.incomplete"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text(name)
    neighbours = contents(tmp_path)
    hf.save_params(params, MODEL, tmp_path / "hf", max_shard_bytes=600)
    shards = {path.name for path in (tmp_path / "hf").glob("*.safetensors")}
    (tmp_path / "hf" / "README.md").write_text("mine")
    (tmp_path / "hf" / ".cache").mkdir()
    (tmp_path / "hf" / ".cache" / "x").write_text("theirs")
    hf.save_params(params, MODEL, tmp_path / "hf")
    found = contents(tmp_path / "hf")
    assert len(shards) > 1 and not shards & set(found)
    assert found["README.md"] == b"mine" and found[".cache/x"] == b"theirs"
    hf.save_params(params, MODEL, tmp_path / "new")
    assert found == contents(tmp_path / "new") | {"README.md": b"mine", ".cache/x": b"theirs"}
    assert {name: data for name, data in contents(tmp_path).items() if name in neighbours} == neighbours
    assert {path.name for path in tmp_path.iterdir()} == {
        "hf",
        "new",
        "hf.old",
        "hf.incomplete",
        ".hf.incomplete",
    }


def test_a_full_disk_at_an_export_is_one_line_and_leaves_the_model_before(tmp_path, params, monkeypatch):
    hf.save_params(params, MODEL, tmp_path / "hf")
    before = contents(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.stored, "write_tensors", full)
    with pytest.raises(
        UserError, match="hf: writing failed .No space left on device.; it takes [0-9,]+ bytes"
    ):
        hf.save_params(params, MODEL, tmp_path / "hf")
    assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_model_that_cannot_be_put_in_place_gives_the_old_one_back(tmp_path, params, monkeypatch):
    hf.save_params(params, MODEL, tmp_path / "hf")
    before, replace = contents(tmp_path), local.os.replace

    def second_fails(source, target):
        if source.name == "new":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(local.os, "replace", second_fails)
    with pytest.raises(UserError, match="Input/output error"):
        hf.save_params(params, MODEL, tmp_path / "hf")
    assert contents(tmp_path) == before


def test_the_probe_of_a_folder_removes_nothing(tmp_path):
    (tmp_path / ".writable").write_text("mine")
    writable_directory(str(tmp_path), "workdir")
    assert contents(tmp_path) == {".writable": b"mine"}
