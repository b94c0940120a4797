"""The command line: good flags build the config, every bad one is a line that names it."""

import dataclasses

import pytest

from gtalign_jax import config
from gtalign_jax.errors import UserError, exit_on_user_error, naming

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


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--workdir="):
        config.writable_directory(str(tmp_path / "file" / "run"), "workdir")
