"""metrics.jsonl survives kills and resumes, progress reads well, rollout dumps are whole."""

import io
import json
import pathlib
import re
import sys
import types

import numpy as np
import pytest

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.rewards.judges.base import Verdict
from gtalign_jax.run.log import KEYS, MetricsConfig, RunLog, metrics_path
from gtalign_jax.run.progress import Progress, format_seconds
from gtalign_jax.run.rollouts import RolloutLine, list_rollouts, write_rollouts

PHASES = ("sft", "rl")
PLAIN = MetricsConfig(tensorboard=False)


def _run(workdir, spans, config=PLAIN):
    """Write (phase, start, stop) spans, each begun at its start."""
    with RunLog(workdir, PHASES, config, clock=lambda: 1.0) as log:
        for phase, start, stop in spans:
            log.begin(phase, start)
            for step in range(start, stop):
                log.write(phase, step, {"reward/welfare": np.float32(0.1) * step, "length/mean": step})


def test_a_resumed_file_is_the_uninterrupted_one(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    _run(whole, [("sft", 0, 5), ("rl", 0, 6)])
    _run(resumed, [("sft", 0, 3)])
    _run(resumed, [("sft", 2, 5), ("rl", 0, 5)])
    with metrics_path(resumed).open("a") as file:
        file.write('{"phase": "rl", "step": 5, "ti')  # killed in the middle of a line
    _run(resumed, [("rl", 4, 6)])
    assert metrics_path(resumed).read_text() == metrics_path(whole).read_text()


def test_a_restart_in_an_earlier_phase_drops_the_later_one(tmp_path):
    _run(tmp_path, [("sft", 0, 3), ("rl", 0, 3)])
    _run(tmp_path, [("sft", 1, 2)])
    assert [(x["phase"], x["step"]) for x in jsonl.read(metrics_path(tmp_path))] == [("sft", 0), ("sft", 1)]


def test_lines_are_strict_json_with_plain_numbers(tmp_path):
    with RunLog(tmp_path, PHASES, PLAIN, clock=lambda: 12.34567) as log:
        log.begin("rl", 0)
        log.write("rl", np.int32(0), {"a/nan": float("nan"), "b/inf": np.float32("inf"), "c": np.int64(3)})
    text = metrics_path(tmp_path).read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line == {"phase": "rl", "step": 0, "time": 12.346, "a/nan": None, "b/inf": None, "c": 3}


def test_a_file_of_another_run_is_refused_and_kept(tmp_path):
    text = '{"phase": "other", "step": 0, "time": 1}\n'
    metrics_path(tmp_path).write_text(text)
    with RunLog(tmp_path, PHASES, PLAIN) as log, pytest.raises(UserError, match="'other' is not of this run"):
        log.begin("sft", 0)
    assert metrics_path(tmp_path).read_text() == text


def test_a_full_disk_is_one_line_with_the_path(tmp_path):
    def write():
        with RunLog(tmp_path, PHASES, PLAIN) as log:
            log.begin("sft", 0)
            log._file = open("/dev/full", "w")  # noqa: SIM115
            log.write("sft", 0, {"a": 1})

    with pytest.raises(UserError, match="metrics.jsonl: writing failed .No space left on device"):
        write()


def test_a_damaged_line_in_the_middle_names_its_number(tmp_path):
    metrics_path(tmp_path).write_text('{"phase": "sft", "step": 0}\n{oops\n{"phase": "sft", "step": 1}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not JSON"):
        jsonl.read(metrics_path(tmp_path))


def test_tensorboard_events_restart_at_the_resumed_step(tmp_path):
    config = MetricsConfig()
    _run(tmp_path, [("sft", 0, 2), ("rl", 0, 4)], config)
    _run(tmp_path, [("rl", 2, 3)], config)
    from tensorboardX.proto.event_pb2 import Event

    def events(path):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
            size = int.from_bytes(data[at : at + 8], "little")
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16

    files = sorted((tmp_path / "tensorboard" / "rl").iterdir(), key=lambda p: len(p.read_bytes()))
    second, first = ([e for e in events(path)] for path in files)
    assert [e.step for e in first for v in e.summary.value if v.tag == "reward/welfare"] == [0, 1, 2, 3]
    assert [e.step for e in second for v in e.summary.value if v.tag == "reward/welfare"] == [2]
    assert any(e.session_log.status == 1 and e.step == 2 for e in second)


def test_wandb_is_optional_and_resumable(tmp_path, monkeypatch):
    config = MetricsConfig(tensorboard=False, wandb_project="p", wandb_mode="offline")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="config.metrics.wandb_project='p' needs W&B"):
        RunLog(tmp_path, PHASES, config)

    calls = []
    run = types.SimpleNamespace(
        log=calls.append, define_metric=lambda *a, **k: None, finish=lambda: calls.append("finish")
    )
    ids = []
    fake = types.SimpleNamespace(init=lambda **kwargs: ids.append(kwargs["id"]) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    _run(tmp_path, [("sft", 0, 1)], config)
    _run(tmp_path, [("sft", 1, 2)], config)
    assert ids[0] == ids[1]
    assert calls[0] == {"sft/reward/welfare": 0.0, "sft/length/mean": 0, "sft/step": 0}
    assert calls.count("finish") == 2


def test_plain_progress_lines_show_the_metrics_and_the_time_left():
    stream, times = io.StringIO(), iter([0.0, 1.0, 10.0, 11.0])
    values = {"loss/policy": 0.1234, "reward/welfare": 0.5, "reward/format": 0.98, "tokens_per_s": 1234.5}
    with Progress("rl", 12, stream=stream, clock=lambda: next(times)) as progress:
        for done in (1, 2, 11, 12):
            progress.update(done, values)
    lines = stream.getvalue().splitlines()
    shown = "loss 0.123  W 0.500  format 98%  1,234 tok/s"
    assert lines == [
        f"rl 1/12  {shown}  - left",
        f"rl 11/12  {shown}  0:01 left",
        f"rl 12/12  {shown}  0:00 left",
    ]


def test_the_bar_on_a_terminal_shows_the_same_text():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress("sft", 4, initial=1, stream=stream) as progress:
        progress.update(2, {"loss/sft": 2.0})
        progress.say("health: sft step 1: bad")
        progress.update(4, {"loss/sft": 1.0})
    text = stream.getvalue()
    assert "health: sft step 1: bad\n" in text
    assert re.search(r"sft 4/4 \|.*\| loss 1.000  0:00 left", text)


def test_seconds_read_as_clock_time():
    assert [format_seconds(s) for s in (5, 65, 3661, float("nan"))] == ["0:05", "1:05", "1:01:01", "-"]


CONTRACT = (
    "input output gts source step score answer_reward format_reward payoff_reward pareto_score user_reward "
    "llm_reward utility reward_gap action n_tokens judge"
).split()


def _line(**overrides):
    numbers = dict.fromkeys([k for k in CONTRACT if k.endswith(("score", "reward"))], 0.5)
    fields = {"input": "q", "output": "a", "gts": "g", "source": "math-hard", "step": 7, "utility": 0.5}
    verdict = Verdict(1.0, latency_s=0.25)
    return RolloutLine(
        **{**numbers, **fields, "action": "DA", "n_tokens": 3, "verdict": verdict, **overrides}
    ).fields()


def test_a_rollout_line_has_the_fields_of_the_contract():
    line = _line(user_reward=0.25, llm_reward=np.float32(0.75))
    assert list(line) == CONTRACT
    assert line["reward_gap"] == 0.5
    assert line["judge"] == {"verdict": 1.0, "reason": "", "latency_s": 0.25}
    assert _line(score=float("nan"))["score"] is None


def test_dumps_keep_hostile_text_and_are_replaced_whole(tmp_path):
    text = "</script>\u2028\x85\x00 line\nnext \ud800 漢字 \U0001f642"
    write_rollouts(tmp_path, "train", 12, [_line()] * 3)
    path = write_rollouts(tmp_path, "train", 12, [_line(output=text)])
    write_rollouts(tmp_path, "test_sft", 0, [])
    assert [line["output"] for line in jsonl.read(path)] == [text]
    assert "漢字" in path.read_text(encoding="utf-8")
    assert [x[:2] for x in list_rollouts(tmp_path)] == [("test_sft", 0), ("train", 12)]
    assert sorted(p.name for p in path.parent.iterdir()) == ["test_sft_0.jsonl", "train_12.jsonl"]
    with pytest.raises(ValueError, match="must be letters, digits"):
        write_rollouts(tmp_path, "../up", 0, [])


def test_every_key_is_documented():
    docs = (pathlib.Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert [key for key in KEYS if f"`{key}`" not in docs] == []
