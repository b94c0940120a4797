"""docs/synthesis.md as a new user follows it: its module and its commands, word for word."""

import json
import os
import pathlib
import re
import subprocess
import sys

from gtalign_jax import jsonl
from tests.synthesis.conftest import REPO

BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (REPO / "docs" / "synthesis.md").read_text(), re.DOTALL)


def test_the_commands_of_the_page_do_what_it_says(tmp_path):
    for name in ("configs", "experiments", "gtalign_jax"):
        (tmp_path / name).symlink_to(REPO / name)
    for text in (text for kind, text in BLOCKS if kind == "python"):
        (tmp_path / re.match(r"# (\S+\.py)", text)[1]).write_text(text)
    lines = "".join(text for kind, text in BLOCKS if kind == "console").replace("\\\n", " ")
    commands = [line.removeprefix("$ ") for line in lines.splitlines() if line.startswith("$ ")]
    assert len(commands) == 4
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1")}
    script = "\n".join(commands)
    done = subprocess.run(["bash", "-e"], input=script, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = jsonl.read(tmp_path / "runs" / "chains" / "train.jsonl")
    assert len(found) == 64 and "chains  " in done.stdout
    for run in ("taught", "epochs"):
        assert (tmp_path / "runs" / run / "hf" / "config.json").is_file()
        assert json.loads((tmp_path / "runs" / run / "config.json").read_text())["sft"]["demonstrations"]
    for record in jsonl.read(tmp_path / "runs" / "mine" / "train.jsonl"):
        assert record["chain"].startswith(f"<thinking>\nThey ask: {record['intent']} Asking back")
        assert record["components"]["thinking"]["teacher"] == "my_teacher:thoughts"
        assert record["components"]["analysis"]["teacher"] == "solver"
