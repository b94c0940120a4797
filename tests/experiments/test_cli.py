"""`gtalign JOB`: what it lists, that a job is the same as a module, and how it refuses."""

import pathlib
import subprocess
import sys

import pytest

from experiments import cli
from gtalign_jax import __version__

LINE = '{"bench": "reward", "case": "rows", "values_per_s": 3.0}\n'


@pytest.fixture
def restored(monkeypatch):
    """A job started here leaves the interpreter as it was: arguments and search path come back."""
    monkeypatch.setattr(sys, "argv", ["gtalign"])
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])


def printed(capsys, *arguments: str) -> str:
    cli.main([*arguments])
    return capsys.readouterr().out


def test_every_module_that_is_started_is_a_job_and_no_other(capsys):
    started = {path.stem for path in cli.FOLDER.glob("*.py") if "\nif __name__ ==" in path.read_text()}
    assert set(cli.jobs()) == started - {"cli"}
    lines = printed(capsys).splitlines()[2:]
    assert [line.split()[0] for line in lines] == sorted(cli.jobs())
    assert {"train", "evaluate", "steer", "check_same"} < set(cli.jobs())
    for line in lines:
        about = line.split(maxsplit=1)[1]
        assert about
        assert "python -m" not in about
    assert printed(capsys, "--help").splitlines()[2:] == lines


def test_the_list_needs_no_jax(tmp_path):
    script = "import sys; from experiments import cli; cli.main([]); assert 'jax' not in sys.modules"
    folder = pathlib.Path(cli.__file__).parent.parent
    subprocess.run([sys.executable, "-c", script], check=True, cwd=folder, stdout=subprocess.DEVNULL)


def test_a_job_is_its_module_started(tmp_path, capsys, restored):
    lines = tmp_path / "lines.jsonl"
    lines.write_text(LINE)
    module = [sys.executable, "-m", "experiments.bench_table", str(lines)]
    folder = pathlib.Path(cli.__file__).parent.parent
    want = subprocess.run(module, check=True, cwd=folder, capture_output=True, text=True)
    assert printed(capsys, "bench_table", str(lines)) == want.stdout
    assert want.stdout
    assert sys.path[0] == ""  # where one stands, as for `python -m`


def test_a_job_refuses_as_its_module_does(refused, restored):
    assert "give one or more files" in refused(cli.main, ["bench_table"])


@pytest.mark.parametrize(
    ("job", "hint"),
    [("trian", "train"), ("check-same", "check_same"), ("qqqq", "`gtalign` alone lists them")],
)
def test_an_unknown_job_is_one_line_with_the_nearest(refused, job, hint):
    line = refused(cli.main, [job])
    assert f"gtalign {job}: no such job" in line
    assert hint in line


@pytest.mark.parametrize("helper", ["bench_common", "bench_limits", "cli", "peers", "__init__"])
def test_a_module_that_only_helps_is_no_job(refused, helper):
    assert "no such job" in refused(cli.main, [helper])


def test_version(capsys):
    assert printed(capsys, "--version") == f"{__version__}\n"
