"""The command line: good flags build the config, every bad one is a line that names it."""

import dataclasses
import errno
import pathlib
import subprocess
import sys

import pytest

from experiments import train
from gtalign_jax import config
from gtalign_jax.errors import UserError, exit_on_user_error, naming

REPO = pathlib.Path(__file__).resolve().parents[1]
CONFIG = """
import ml_collections
def get_config(arg=""):
    return ml_collections.ConfigDict({"lr": 1e-3, "sft": {"steps": 3}, "tag": arg or "none"})
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


def parse(*argv):
    return config.parse_command(["prog", *argv], required={"workdir": "where files go"})


def test_overrides_and_variant(config_file):
    cfg, flags = parse(f"--config={config_file}:big", "--config.sft.steps=7", "--workdir=w")
    assert (cfg.sft.steps, cfg.lr, cfg.tag) == (7, 1e-3, "big")
    assert flags == {"workdir": "w"}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--config.sft.stepz=1", "--workdir=w"], r"^--config\.sft\.stepz: no such field; known: steps$"),
        (["--config.tagg=1", "--workdir=w"], r"^--config\.tagg: no such field; known: lr, sft, tag$"),
        (["--config.sft.steps=1", "--noconfig.sfft.steps", "--workdir=w"], r"^--config\.sfft: no such field"),
        (["--config.sft.steps.more=1", "--workdir=w"], r"sft\.steps\.more"),
        (["--config.sft.steps=many", "--workdir=w"], "sft.steps"),
        (["--workdirr=w"], "workdirr"),
        ([], "--workdir"),
        (["--workdir=w", "stray"], "stray"),
    ],
)
def test_bad_flag_is_one_line_naming_it(config_file, flags, named):
    with pytest.raises(UserError, match=named) as error:
        parse(f"--config={config_file}", *flags)
    assert "\n" not in str(error.value)


def test_missing_config_file():
    with pytest.raises(UserError, match="nowhere.py"):
        parse("--config=nowhere.py", "--workdir=w")


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        ("def get_config(:\n", 1, "SyntaxError: invalid syntax"),
        ("import no_such_module\n", 1, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import helper_for_test\n\n\ndef get_config():\n    helper_for_test.f()\n", 0, "KeyError: lr"),
        ("def get_config():\n    return 1 / 0\n", 2, "ZeroDivisionError: division by zero"),
        (
            f"{CONFIG}    c = 1\n".replace("return", "c ="),
            0,
            "get_config() returned NoneType and no",
        ),
        (CONFIG.replace("return", "c =") + '    c.sft.steps = "three"\n', 5, "TypeError: Could not override"),
        (CONFIG.replace("return", "c =") + "    c.lock()\n    c.sft.step = 3\n", 6, "AttributeError: "),
        ("def get_config():\n    open('/nowhere/at_all')\n", 2, "FileNotFoundError: "),
        ("def get_config():\n    return {}\n", 0, "get_config() returned dict and no ConfigDict"),
        ("config = 3\n", 0, "has no attribute 'get_config'"),
        ("from gtalign_jax.errors import UserError\nraise UserError('no such task')\n", 0, "no such task"),
        ("\xff", 1, "SyntaxError: "),
    ],
)
def test_a_config_file_that_fails_is_one_line_with_the_place(tmp_path, monkeypatch, text, line, named):
    (tmp_path / "helper_for_test.py").write_text("def f():\n    return {}['lr']\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the file of the test before
    path = tmp_path / "mine.py"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as error:
        parse(f"--config={path}", "--config.lr=1", "--workdir=w")
    message = str(error.value)
    assert named in message and "\n" not in message and "Traceback" not in message
    if line:
        assert message.startswith(f"{path}:{line}: ")
    if "helper" in text:
        assert message.startswith(f"{tmp_path / 'helper_for_test.py'}:2: ")


def test_a_variant_that_a_config_does_not_know_is_refused():
    with pytest.raises(UserError, match="^config variant 'zzz': use tiny, or leave it out$"):
        parse("--config=configs/quickstart.py:zzz", "--workdir=w")
    with pytest.raises(UserError, match="^--config=configs/real_small.py:zzz: get_config.. takes 0"):
        parse("--config=configs/real_small.py:zzz", "--workdir=w")


@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 0.1
    buckets: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr}: must be positive")


def test_section_round_trip_and_refusals():
    section = config.section(Settings, lr=0.5)
    assert config.build(Settings, section, "opt") == Settings(lr=0.5)
    with pytest.raises(UserError, match="config.opt.lrr"):
        config.build(Settings, {"lrr": 1}, "opt")
    with pytest.raises(UserError, match=r"^config\.opt\.lr=-1\.0: must be positive$"):
        config.build(Settings, {"lr": -1.0}, "opt")


@dataclasses.dataclass(frozen=True)
class Phase:
    optimizer: Settings = Settings()


def test_a_section_inside_a_section_is_named_whole():
    assert config.build(Phase, {"optimizer": {"lr": 2.0}}, "sft") == Phase(Settings(lr=2.0))
    with pytest.raises(UserError, match=r"^config\.sft\.optimizer\.lr=0: must be positive$"):
        config.build(Phase, {"optimizer": {"lr": 0}}, "sft")
    with pytest.raises(UserError, match=r"^config\.sft\.optimizer\.lrr: no such field; known: buckets, lr$"):
        config.build(Phase, {"optimizer": {"lrr": 0}}, "sft")


def test_naming_leaves_what_is_named_already():
    with pytest.raises(UserError, match="^--temperature=-1: must be 0$"), naming("--"):
        raise ValueError("temperature=-1: must be 0")
    with pytest.raises(UserError, match="^P.jsonl: not found$"), naming("--"):
        raise UserError("P.jsonl: not found")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("math:nope", "module 'math' has no attribute 'nope'"),
        ("math:pi", "pi is not a function"),
        ("no_such_module_here:f", "No module named 'no_such_module_here'"),
        ("math", "write module:function"),
        (":f", "write module:function"),
        ("broken_for_test:f", r"invalid syntax \(broken_for_test.py, line 1\)"),
    ],
)
def test_a_symbol_that_is_not_there_is_one_line(tmp_path, monkeypatch, path, message):
    (tmp_path / "broken_for_test.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"^config.algorithm.loss='{path}': {message}$"):
        config.load_symbol(path, "config.algorithm.loss")
    assert config.load_symbol("math:sqrt", "config.algorithm.loss")(9) == 3


def test_user_error_exits_with_status_two(capsys):
    @exit_on_user_error
    def main():
        raise UserError("config.data.root: missing")

    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: config.data.root: missing\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory (no more is to be had); compute less"),
        (
            MemoryError("Unable to allocate 1.2 TiB"),
            "out of memory (Unable to allocate 1.2 TiB); compute less",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n[x]"),
            "(Out of memory allocating",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), "/tmp/x: writing failed (No space left"),
    ],
)
def test_a_machine_that_is_full_is_one_line(capsys, error, line):
    @exit_on_user_error
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_:
        main()
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and said.count("\n") == 1 and said.startswith("error: ") and line in said


def test_another_runtime_error_keeps_its_traceback():
    @exit_on_user_error
    def main():
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        main()


def test_a_reader_that_goes_away_is_no_fault():
    code = "from gtalign_jax.errors import *\nexit_on_user_error(lambda: [print(i) for i in range(10**6)])()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPO
    )
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)
    process.stderr.close()


@pytest.mark.parametrize("config", [(), ("--config=configs/quickstart.py:tiny",)])
def test_help_lists_every_field_with_what_its_section_says(capsys, config):
    with pytest.raises(SystemExit) as exit_:
        train.main(["train", "--help", *config])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and "--workdir=...  folder of the run's files" in text
    for name in ("algorithm.kl_coef", "reward.fn", "engine.limits.thinking", "seed", "model.hidden_size"):
        assert f"  --config.{name}=" in text
    assert f"--config.sft.steps={4 if config else 0}\n" in text
    assert "The cold start: `steps` updates on" in text and "in_flight" in text


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--workdir="):
        config.writable_directory(str(tmp_path / "file" / "run"), "workdir")
