"""A store that refuses, fails or is not there: one line with the path and the mend, or a retry."""

import json
import sys
import threading

import pytest

from experiments import analyze, data, export, train
from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.files import clients, drafts, paths
from gtalign_jax.models import stored

TINY = "--config=configs/quickstart.py:tiny"


def stopped_with(capsys, main, argv):
    """The line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1, err
    return err


def test_a_place_that_cannot_hold_a_run_is_one_line(gs, amazon, capsys):
    for url in ("gs://no-such-bucket", "s3://no-such-bucket"):
        line = stopped_with(capsys, train.main, ["train", TINY, f"--workdir={url}/run"])
        assert f"--workdir={url}/run: there is no such bucket" in line
    line = stopped_with(capsys, train.main, ["train", TINY, f"--workdir={amazon}/run"])
    assert "checkpoints stay on a disk or on gs://" in line
    argv = ["--checkpoint=gs://no-such-bucket/run/checkpoints", f"--out={gs}/hf"]
    assert "gs://no-such-bucket/run/config.json: not found" in stopped_with(capsys, export.main, argv)


@pytest.mark.parametrize("status", [401, 403])
def test_a_bucket_without_permission_is_one_line(gs, emulator, capsys, status):
    emulator.refusal = status
    line = stopped_with(capsys, train.main, ["train", TINY, f"--workdir={gs}/run"])
    assert f"--workdir={gs}/run: not permitted" in line and "log in" in line


def test_reading_where_it_is_not_permitted_is_one_line(gs, emulator, capsys):
    emulator.refusal = 403
    exporting = [f"--checkpoint={gs}/run/checkpoints", "--out=out"]
    for main, argv in ((export.main, exporting), (analyze.main, [f"{gs}/a.jsonl", f"{gs}/b.jsonl"])):
        line = stopped_with(capsys, main, argv)
        assert "Forbidden" in line and "a-bucket" in line and "see that" in line


QUESTIONS = [{"question": f"How many {i}?", "truth": i} for i in range(20)]
OWN = ("data", TINY, "--config.data.tasks=('math',)")


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("source", ["jsonl:{}/q.jsonl", "parquet:{}/q.parquet", "jsonl:{}/folder", "gtalign"])
def test_questions_in_a_bucket_without_permission_are_one_line(gs, emulator, capsys, source, status):
    emulator.refusal = status
    flags = [f"--config.data.source={source.format(gs)}", f"--config.data.root={gs}/gtalign"]
    line = stopped_with(capsys, data.main, [*OWN, *flags])
    assert gs in line and "permit" in line


def test_questions_on_a_store_that_is_down_for_a_while_are_waited_for(gs, emulator, capsys):
    path = paths.path(f"{gs}/down/q.jsonl")
    jsonl.write(path, QUESTIONS)
    emulator.refusal, before = 503, emulator.refused
    threading.Timer(1.0, setattr, (emulator, "refusal", 0)).start()
    data.main([*OWN, f"--config.data.source=jsonl:{path}", "--json"])
    splits = json.loads(capsys.readouterr().out)["tasks"]["math"]["splits"]
    assert sum(split["rows"] for split in splits.values()) == 20 and emulator.refused > before


def test_questions_on_a_store_that_stays_down_are_one_line(gs, emulator, capsys, monkeypatch):
    path = paths.path(f"{gs}/gone/q.jsonl")
    jsonl.write(path, QUESTIONS)
    monkeypatch.setattr(clients, "PATIENCE_S", 0.5)
    emulator.refusal = 503
    line = stopped_with(capsys, data.main, [*OWN, f"--config.data.source=jsonl:{path}"])
    assert str(path) in line


def test_a_missing_client_is_one_line_with_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    clients.register.cache_clear()
    line = stopped_with(capsys, train.main, ["train", TINY, "--workdir=gs://a-bucket/run"])
    assert "gs:// needs gcsfs: pip install 'gtalign-jax[gs]'" in line
    clients.register.cache_clear()


def test_a_store_that_is_down_for_a_while_is_waited_for(gs, emulator):
    path = paths.path(f"{gs}/down/lines.jsonl")
    emulator.refusal, before = 503, emulator.refused
    timer = threading.Timer(1.0, setattr, (emulator, "refusal", 0))
    timer.start()
    jsonl.write(path, [{"a": 1}])
    assert jsonl.read(path) == [{"a": 1}] and emulator.refused > before


def test_a_store_that_stays_down_is_one_line_and_nothing_is_lost(gs, emulator, monkeypatch, caplog):
    path = paths.path(f"{gs}/gone/lines.jsonl")
    jsonl.write(path, [{"a": 1}])
    monkeypatch.setattr(clients, "PATIENCE_S", 0.5)

    def lines():
        emulator.refusal = 503
        yield {"a": 2}

    with pytest.raises(UserError, match="jsonl: the store does not answer .*503.* run the same command"):
        jsonl.write(path, lines(), keep=True)
    emulator.refusal = 0
    assert jsonl.read(path) == [{"a": 1}]
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("gtalign_jax")]
    assert jsonl.read(ours[-1].rpartition(" ")[2]) == [{"a": 2}]


def test_faults_in_a_model_file_name_it(bucket):
    folder = paths.path(f"{bucket}/damaged")
    jsonl.write_atomic(folder / "model.safetensors", "no tensors at all")
    with pytest.raises(UserError, match="model.safetensors: damaged"):
        stored.read_headers(folder)
    with pytest.raises(UserError, match="elsewhere: neither model.safetensors nor"):
        stored.read_headers(paths.path(f"{bucket}/elsewhere"))


def test_growing_files_are_on_record_once_they_are_brought(bucket):
    folder = paths.path(f"{bucket}/grown")
    grown = drafts.grown(folder)
    with (grown.folder / "lines").open("a") as sink:
        for k in range(2):
            print(k, file=sink, flush=True)
            grown.bring()
            assert (folder / "lines").read_text() == "".join(f"{j}\n" for j in range(k + 1))
    grown.close()
    assert not grown.folder.exists()
