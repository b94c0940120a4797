"""What the kill check compares, and what it says of a run that was cut short."""

import json
import signal
import subprocess
import sys

import pytest

from experiments import check_kills
from gtalign_jax.errors import UserError

LINES = [
    {"phase": "sft", "step": 0, "time": 1.0, "loss/sft": 2.0},
    {"phase": "align", "step": 0, "time": 2.0, "kl/ref": 0.1},
]


def write_run(folder, lines=LINES, files=("hf/model.safetensors", "rollouts/sft_1.jsonl", "summary.json")):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_every_byte_counts_but_those_of_the_clock(tmp_path):
    one = write_run(tmp_path / "one")
    later = [line | {"time": 9.0, "tokens_per_s": 3.0, "compile/programs": 0} for line in LINES]
    two = write_run(tmp_path / "two", later)
    assert check_kills.differences(one, two) == []
    (two / "hf" / "model.safetensors").write_text("other")
    (two / "rollouts" / "sft_1.jsonl").unlink()
    (two / "rollouts" / "extra.jsonl").write_text("")
    assert check_kills.differences(one, two) == [
        "hf/model.safetensors",
        "rollouts/extra.jsonl",
        "rollouts/sft_1.jsonl",
    ]
    three = write_run(tmp_path / "three", [LINES[0], LINES[1] | {"kl/ref": 0.2}])
    assert check_kills.differences(one, three) == ["metrics.jsonl"]
    assert check_kills.differences(one, write_run(tmp_path / "four", LINES[:1])) == ["metrics.jsonl"]


def test_the_files_tell_where_a_run_was(tmp_path):
    assert check_kills.whereabouts(tmp_path) == "cold start, after the start"
    write_run(tmp_path, LINES[:1], files=("checkpoints/sft/2.orbax-checkpoint-tmp/state",))
    assert check_kills.whereabouts(tmp_path) == "cold start, after sft step 0, in a save"
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "sft_1.jsonl").touch()
    assert check_kills.whereabouts(tmp_path) == "alignment, after sft step 0, in a save"
    (tmp_path / ".hf.1234.incomplete").mkdir()
    assert check_kills.whereabouts(tmp_path).startswith("export")


@pytest.mark.parametrize(("code", "killed"), [("import time; time.sleep(60)", True), ("", False)])
def test_a_kill_counts_when_the_run_was_still_going(code, killed):
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    if not killed:
        process.wait()
        assert check_kills.processor_s(process) == float("inf")
    assert check_kills.kill_group(process) == killed
    assert process.returncode == (-signal.SIGKILL if killed else 0)


def test_a_used_folder_and_a_misspelt_field_are_refused_before_anything_runs(tmp_path):
    main, config = check_kills.main.__wrapped__, "--config=configs/quickstart.py:tiny"
    with pytest.raises(UserError, match="stps"):
        main([config, "--config.sft.stps=3", f"--workdir={tmp_path}"])
    (tmp_path / "old").touch()
    with pytest.raises(UserError, match="is not empty"):
        main([config, f"--workdir={tmp_path}"])
