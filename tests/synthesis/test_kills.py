"""A synthesis that is killed leaves whole records, and the same command ends as if it never was."""

import json
import random
import signal
import subprocess
import sys
import time

from configs import quickstart
from gtalign_jax.synthesis.job import synthesize
from gtalign_jax.synthesis.store import records
from tests.synthesis.conftest import REPO

COMMAND = [
    *(sys.executable, "-m", "experiments.synthesize", "--config=configs/quickstart.py:tiny"),
    *("--config.data.train_per_task=24", "--config.synthesis.at_once=1"),
]


def outputs(workdir):
    """What is there at the end; files of data sets differ in a few bytes whenever they are written."""
    found = {path.relative_to(workdir): path for path in workdir.rglob("*") if path.is_file()}
    texts = {str(name): path.read_bytes() for name, path in found.items() if name.parts[0] != "tfds"}
    return texts, sorted(str(name) for name in found)


def test_killed_runs_leave_whole_records_and_end_the_same(tmp_path, caplog):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    config = quickstart.get_config("tiny")
    config.data.train_per_task, config.synthesis.at_once = 24, 1
    whole.mkdir()
    synthesize(config, whole)
    rng, counts = random.Random(0), [0]
    for _ in range(2):
        process = subprocess.Popen([*COMMAND, f"--workdir={killed}"], cwd=REPO, stderr=subprocess.PIPE)
        wanted = counts[-1] + rng.randrange(5, 20)
        while len(list(killed.glob("parts/*.jsonl"))) < wanted and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path in killed.rglob("*.jsonl"):
            assert all(json.loads(line)["chain"] for line in path.read_text().splitlines())
        counts.append(len(list(records(killed))))
    assert 0 < counts[1] < counts[2] < 96
    synthesize(config, killed)
    assert "is gone; taking over" in caplog.text
    assert outputs(killed) == outputs(whole)
