"""Hand-made runs: what a workdir holds, hostile texts among it."""

import json

import numpy as np
import pytest

from gtalign_jax import jsonl
from gtalign_jax.chain.prompt import format_chain
from gtalign_jax.evaluation.bootstrap import summary_table
from gtalign_jax.rewards.judges.base import Verdict
from gtalign_jax.run.rollouts import RolloutLine, write_rollouts

HOSTILE = "</script><script>alert(1)</script> <img src=x onerror=alert(1)> \u2028 & done"


def line(source, i, shift=0.0, text=None, prompt=None):
    """A rollout line; W grows with i and shift."""
    matrix = np.random.default_rng(i).uniform(-4, 4, (2, 3, 2)).round(1)
    user, llm = 0.4 + shift + 0.01 * i, 0.5 + shift
    return RolloutLine(
        input=prompt or f"prompt {i}",
        output=text or format_chain("Thought.", matrix, "choose CQ.", f"Which one? {shift:g}"),
        gts="truth",
        source=source,
        step=3,
        score=float(np.sqrt(user * llm)),
        answer_reward=1.0,
        format_reward=1.0,
        payoff_reward=1.0,
        pareto_score=1.0,
        user_reward=user,
        llm_reward=llm,
        utility=float(np.sqrt(user * llm)),
        action="CQ",
        n_tokens=50 + i,
        verdict=Verdict(1.0, "rule"),
    ).fields()


def record(folder, shift=0.0, seed=0):
    """A run whose aligned model is better than its cold start by 0.2 and `shift` of each reward."""
    folder.mkdir(exist_ok=True)
    rows = {
        model: [line(source, i, gain) for source in ("math-hard", "ambig_qa") for i in range(6)]
        for model, gain in (("sft", 0.0), ("aligned", 0.2 + shift))
    }
    rows["aligned"][0] = line("math-hard", 0, 0.2 + shift, HOSTILE, prompt=f"{HOSTILE} too")
    for model, lines in rows.items():
        write_rollouts(folder, model, 3, lines)
    write_rollouts(folder, "train", 0, rows["sft"])
    metrics = [
        {"phase": "align", "step": k, "time": 0.0, "reward/welfare": 0.3 + k / 50, "reward/user": 0.4}
        | {"reward/llm": 0.5, "kl/ref": 0.01 * k, "length/mean": 90.0, "entropy/mean": 1.0}
        for k in range(20)
    ]
    jsonl.write(folder / "metrics.jsonl", metrics)
    (folder / "config.json").write_text(json.dumps({"seed": seed, "align": {"steps": 20}}))
    (folder / "summary.json").write_text(json.dumps(summary_table(rows, n_boot=50)))
    side = {"payoff": np.zeros((2, 3, 2)).tolist(), "action": "DA", "text": HOSTILE}
    steering = {"task": "math", "prompt": "p", "policy": "per_token", "price": 2.0}
    jsonl.write(folder / "steering.jsonl", [{**steering, "before": side, "after": side}])
    return folder


@pytest.fixture
def workdir(tmp_path):
    return record(tmp_path)


@pytest.fixture
def runs(tmp_path):
    """Two runs, the second better and of another seed."""
    return [record(tmp_path / "first"), record(tmp_path / "second", shift=0.1, seed=7)]
