"""A run's recorded config: another run's is refused, one from before a field went is as good as new."""

import json

import pytest

from gtalign_jax import config as config_lib
from gtalign_jax.errors import UserError
from gtalign_jax.run.record import ADDED, RETIRED, check_config, read_config_json, write_config
from gtalign_jax.run.settings import make_settings

STEP = '{"phase": "sft", "step": 0, "time": 0.0}\n'
OLD_MODEL = {"attention": "splash", "decode_layout": "rows", "param_dtype": "float32"}


def config(*flags):
    command = ["prog", "--config=configs/quickstart.py:tiny", "--workdir=x", *flags]
    return config_lib.parse_command(command, {"workdir": ""})[0]


@pytest.fixture
def old_run(tmp_path):
    """A workdir that was made when `config.model` had switches which no run read."""
    fields = config().to_dict()
    assert not set(OLD_MODEL) & set(fields["model"]) and set(OLD_MODEL) == set(RETIRED["model"])
    fields["model"] |= OLD_MODEL
    (tmp_path / "config.json").write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")
    (tmp_path / "metrics.jsonl").write_text(STEP)
    return tmp_path


def test_an_old_run_goes_on_and_keeps_what_it_recorded(old_run):
    before = (old_run / "config.json").read_bytes()
    check_config(config(), old_run)
    write_config(config(), old_run)
    assert (old_run / "config.json").read_bytes() == before


def test_an_old_run_is_read_without_what_is_gone(old_run):
    read = read_config_json(old_run)
    assert config_lib.to_json(read) == config_lib.to_json(config())
    assert make_settings(read) == make_settings(config())


def test_what_a_run_reads_still_tells_runs_apart(old_run):
    for flag, line in (
        (
            "model.num_layers=3",
            r"another config.model.num_layers \(2, now 3\): the steps so far were made with it; name a",
        ),
        ("start.attention=xla", r"another config.start.attention \('auto', now 'xla'\)"),
        ("seed=1", r"another config.seed \(0, now 1\)"),
    ):
        with pytest.raises(UserError, match=line):
            check_config(config(f"--config.{flag}"), old_run)


def test_a_new_run_records_its_config_once(tmp_path):
    check_config(config(), tmp_path)
    write_config(config(), tmp_path)
    assert (tmp_path / "config.json").read_text() == config_lib.to_json(config())
    check_config(config(), tmp_path)


@pytest.mark.parametrize("field", [*OLD_MODEL, "compute_dtype", "remat", "scan_layers"])
def test_a_model_has_no_switches(field):
    with pytest.raises(UserError, match=rf"^--config\.model\.{field}: no such field; known: family, "):
        config(f"--config.model.{field}=float32")


def test_the_start_says_how_its_model_is_computed():
    flags = ("remat=full", "attention=xla", "decode_layout=rows", "compute_dtype=bfloat16")
    runtime = make_settings(config(*(f"--config.start.{flag}" for flag in flags))).start.runtime
    assert [getattr(runtime, flag.partition("=")[0]) for flag in flags] == [
        flag.partition("=")[2] for flag in flags
    ]
    assert (runtime.param_dtype, runtime.scan_layers) == ("float32", False)  # as the quickstart says
    with pytest.raises(UserError, match="^config.start.remat='half': must be one of none, dots, full$"):
        make_settings(config("--config.start.remat=half"))


def test_credentials_of_an_old_run_are_not_repeated(tmp_path):
    fields = config().to_dict()
    fields["judge"]["endpoints"] = ["http://user:hunter2@host/v1"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    leave(tmp_path, "metrics")
    with pytest.raises(UserError, match=r"config.judge.endpoints .*\*\*\*@host") as error:
        check_config(config(), tmp_path)
    assert "hunter2" not in str(error.value)


def test_a_run_from_before_a_field_was_added_goes_on_with_its_default(tmp_path):
    fields = json.loads(config_lib.to_json(config()))
    for section, values in ADDED.items():
        assert values == {name: fields[section].pop(name) for name in values}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    check_config(config(), tmp_path)
    assert make_settings(read_config_json(tmp_path)) == make_settings(config())
    leave(tmp_path, "metrics")
    check_config(config("--config.engine.patience_s=9.0"), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('{"seed": 1', "not JSON"),
        ("[]", "must be a JSON object"),
        ("[" * 900, "not JSON|nested"),
    ],
    ids=["empty", "cut", "list", "deep"],
)
def test_a_config_that_is_no_object_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"config.json: .*({message})"):
        read_config_json(tmp_path)


def test_a_config_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "config.json").write_text(config_lib.to_json(config("--config.seed=1")), encoding="utf-8-sig")
    assert read_config_json(tmp_path).seed == 1


def leave(workdir, mark):
    """What a run leaves from its first step on."""
    if mark == "metrics":
        (workdir / "metrics.jsonl").write_text(STEP)
    elif mark == "checkpoint":
        (workdir / "checkpoints" / "align" / "2").mkdir(parents=True)
    else:
        (workdir / "checkpoints").mkdir()
        (workdir / "checkpoints" / "align").write_text("")


@pytest.mark.parametrize("mark", ["metrics", "checkpoint", "a file in the place of checkpoints"])
def test_a_run_without_its_config_is_refused_and_kept(tmp_path, mark):
    leave(tmp_path, mark)
    with pytest.raises(UserError, match=f"^{tmp_path}: holds a run without its config.json"):
        check_config(config(), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_run_that_never_made_a_step_gives_way_to_its_mended_config(tmp_path):
    wrong = config("--config.sft.steps=-1", "--config.seed=3")
    write_config(wrong, tmp_path)
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "config.json").write_text("{}")  # a model of the wrong seed
    (tmp_path / "metrics.jsonl").touch()
    check_config(config(), tmp_path)
    write_config(config(), tmp_path)
    assert (tmp_path / "config.json").read_text() == config_lib.to_json(config())
    assert not (tmp_path / "init").exists()


def test_a_model_that_was_given_is_never_removed(tmp_path):
    write_config(config(f"--config.start.path={tmp_path / 'init'}"), tmp_path)
    (tmp_path / "init").mkdir()
    write_config(config("--config.seed=1"), tmp_path)
    assert (tmp_path / "init").is_dir()


@pytest.mark.parametrize("mark", ["metrics", "checkpoint", "rollouts"])
def test_after_a_step_or_an_evaluation_another_config_is_refused(tmp_path, mark):
    write_config(config(), tmp_path)
    if mark == "rollouts":
        (tmp_path / "rollouts").mkdir()
        (tmp_path / "rollouts" / "model_0.jsonl").write_text("{}\n")
    else:
        leave(tmp_path, mark)
    with pytest.raises(UserError, match=r"another config.seed \(0, now 1\).* remove the folder /"):
        check_config(config("--config.seed=1"), tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b'{"seed": ', b"[]", b"\xff\xfe{}", b"null", b'{"model": 3, "seed": 0}', b"[" * 10_000]
)
def test_a_damaged_config_is_one_line_that_names_it(tmp_path, data):
    (tmp_path / "metrics.jsonl").write_text(STEP)
    (tmp_path / "config.json").write_bytes(data)
    for read in (read_config_json, lambda workdir: check_config(config(), workdir)):
        with pytest.raises(UserError, match="config.json: ") as error:
            read(tmp_path)
        assert "\n" not in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == data


def test_a_config_may_be_indented_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(STEP)
    (tmp_path / "config.json").write_text(json.dumps(config().to_dict(), indent=4))
    check_config(config(), tmp_path)
    assert config_lib.to_json(read_config_json(tmp_path)) == config_lib.to_json(config())


def test_reading_a_run_calls_no_code_that_its_config_names(tmp_path, monkeypatch):
    (tmp_path / "algorithm_for_test.py").write_text(
        "from gtalign_jax.learning.algorithm import PRESETS\n\ndef mine():\n    return PRESETS['ppo']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = ("--config.align.algorithm=algorithm_for_test:mine", "--config.algorithm.kl_coef=0.5")
    write_config(config(*flags), tmp_path)
    check_config(config(*flags), tmp_path)
    wanted = make_settings(config(*flags)).algorithm
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["align"]["algorithm"] = "os:abort"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert make_settings(read_config_json(tmp_path)).algorithm == wanted
    del fields["resolved_algorithm"]  # of a run before there was this field
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="'os:abort' is code, which is not called to read a run"):
        read_config_json(tmp_path)
