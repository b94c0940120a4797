"""A run's rollouts given to `score`: the numbers come out as they were recorded."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from experiments import score
from gtalign_jax import config as config_lib
from gtalign_jax import jsonl
from gtalign_jax.data import sources, teacher
from gtalign_jax.rewards.features import extract
from gtalign_jax.rewards.judges.base import Verdict
from gtalign_jax.rewards.judges.rules import judge_by_rules
from gtalign_jax.rewards.mutual_welfare import resolve_reward
from gtalign_jax.run.rollouts import write_rollouts
from gtalign_jax.run.score import Scored, compute_reward, rollout_lines
from gtalign_jax.run.settings import make_settings, run_tasks

NUMBERS = (
    "score answer_reward format_reward payoff_reward pareto_score user_reward llm_reward utility".split()
)
OTHERS = ("--config.reward.alpha=0.3", "--config.reward.fn=linear", "--config.features.missing=zero")


def run_of(workdir, *flags):
    """The rollout file of a run on the teacher's chains, one of them broken, one without a verdict."""
    command = ["prog", "--config=configs/quickstart.py:tiny", *flags]
    config, _ = config_lib.parse_command(command, {})
    settings = make_settings(config)
    tasks, rng = run_tasks(settings.data), np.random.default_rng(0)
    data = dataclasses.replace(settings.data, train_per_task=3)
    items = sources.load_items(data, tasks, sources.TRAIN)
    texts = [teacher.write_chain(item, tasks[item.task], rng) for item in items]
    texts[0] = texts[0].replace("<analyze>", "")

    def judge(requests):
        given = judge_by_rules(requests, tasks)
        return [*given[:-1], Verdict(None, "timeout")]

    batch = extract(texts, items, judge, settings.features, tasks=tasks)
    reward = jax.device_get(compute_reward(resolve_reward(config.reward.fn), batch.features, settings.reward))
    rows = types.SimpleNamespace(completions=types.SimpleNamespace(length=np.full((len(items), 1), 9)))
    workdir.mkdir()
    (workdir / "config.json").write_text(config_lib.to_json(config))
    return write_rollouts(workdir, "aligned", 4, rollout_lines(rows, Scored(texts, items, batch, reward), 4))


PLAIN = ("--config.features.chain=plain",)


@pytest.mark.parametrize("flags", [(), OTHERS, PLAIN], ids=["defaults", "another reward", "no chain"])
def test_the_numbers_come_out_as_they_are_recorded(tmp_path, flags):
    path, out = run_of(tmp_path / "run", *flags), tmp_path / "out.jsonl"
    score.main([str(path), str(out)])
    recorded, scored = jsonl.read(path), jsonl.read(out)
    assert len({line["score"] for line in recorded}) > 3  # there is something to compare
    for line, again in zip(recorded, scored, strict=True):
        for name in NUMBERS:
            assert again[name] == pytest.approx(line[name], abs=1e-6), name
        assert again["action"] == line["action"] and again["judge"]["verdict"] == line["judge"]["verdict"]
        assert {name: again[name] for name in ("input", "output", "gts")} == {
            name: line[name] for name in ("input", "output", "gts")
        }
    if not flags:
        assert recorded[-1]["score"] is None and scored[-1]["score"] is None


def test_another_reward_is_asked_for_by_name(tmp_path):
    path, out = run_of(tmp_path / "run"), tmp_path / "out.jsonl"
    score.main([str(path), str(out), "--reward=user"])
    assert all(line["score"] == line["user_reward"] for line in jsonl.read(out))


def test_code_that_a_runs_config_names_is_not_called(tmp_path, refused):
    path = run_of(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["reward"]["fn"] = "os:abort"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    line = refused(score.main, [path, tmp_path / "out.jsonl"])
    assert line.endswith("the reward of its run is code; name it with --reward=os:abort")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"judge": None}, "judge an object with a verdict"),
        ({"judge": {"verdict": "1"}}, "judge an object with a verdict"),
        ({"source": 3}, "source must be a string"),
        ({"source": "poetry"}, "task='poetry': must be one of"),
        ({"gts": 4}, "ground_truth must be a string"),
    ],
)
def test_a_rollout_line_that_is_damaged_is_named(tmp_path, refused, change, message):
    path = run_of(tmp_path / "run")
    lines = jsonl.read(path)
    jsonl.write(path, [lines[0], lines[1] | change])
    line = refused(score.main, [path, tmp_path / "out.jsonl"])
    assert line.startswith(f"error: {path}:2: ") and message in line
