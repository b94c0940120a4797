"""docs/tasks.md as a new user follows it: its module, its questions, its commands, word for word."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from gtalign_jax import jsonl

REPO = pathlib.Path(__file__).resolve().parent.parent
PAGE = (REPO / "docs" / "tasks.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def files():
    """Name to text of the page's Python files; each begins with its name."""
    return {re.match(r"# (\S+\.py)", text)[1]: text for kind, text in BLOCKS if kind == "python"}


def commands():
    lines = "".join(text for kind, text in BLOCKS if kind == "console").replace("\\\n", " ")
    return [line.removeprefix("$ ") for line in lines.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """(folder, output) after all commands of the page, in a folder that stands for the repository's."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("configs", "experiments", "gtalign_jax"):
        (folder / name).symlink_to(REPO / name)
    for name, text in files().items():
        (folder / name).write_text(text)
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1")}
    done = subprocess.run(
        ["bash", "-e"], input="\n".join(commands()), cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_task_takes_under_twenty_lines():
    code = [line for line in files()["my_tasks.py"].splitlines() if line.strip()]
    assert len(code) < 20


def test_a_reader_takes_leaves_out_or_refuses():
    scope = {}
    exec(files()["my_reader.py"], scope)
    item = scope["read"]({"language": "en", "prompt": "Where?", "page": "3"})
    assert (item.intent, item.ground_truth) == ("Where?", "3")
    assert scope["read"]({"language": "de"}) is None
    with pytest.raises(ValueError, match="page None: must be text"):
        scope["read"]({"language": "en", "prompt": "Where?"})


def test_fifty_questions_are_trained_on_evaluated_and_reported(followed):
    folder, out = followed
    asked = jsonl.read(folder / "questions.jsonl")
    assert len(asked) == 50
    tasks = {}
    for run, models in (("cited", ["sft", "aligned"]), ("cited_again", ["model"])):
        summary = json.loads((folder / "runs" / run / "summary.json").read_text())
        assert list(summary) == models
        for model in models:
            assert list(summary[model]) == ["cited", "overall"]
            tasks[model] = summary[model]["cited"]["answer_reward"]
        assert "cited" in (folder / "runs" / run / "report.html").read_text()
    assert tasks["aligned"] == tasks["model"]  # the export is the model that was evaluated
    assert out.count("\ncited ") >= 2 * 6 and "model   " in out
    metrics = jsonl.read(folder / "runs" / "cited" / "metrics.jsonl")
    assert any("reward/welfare/cited" in line for line in metrics)


def test_each_question_stands_in_one_split_and_is_named_in_its_rollouts(followed):
    folder, _ = followed
    names = {row["id"] for row in jsonl.read(folder / "questions.jsonl")}
    rollouts = folder / "runs" / "cited" / "rollouts"
    trained = {line["id"] for path in rollouts.glob("train_*") for line in jsonl.read(path)}
    held_out = jsonl.read(rollouts / "aligned_4.jsonl")
    tested = {line["id"] for line in held_out}
    assert trained and tested and not trained & tested and trained | tested <= names
    assert all(line["source"] == "cited" and "seen" not in line for line in held_out)
