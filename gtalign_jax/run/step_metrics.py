"""What a step of alignment reports beside its update: counts of judges and servers, and what was written."""

import numpy as np

from gtalign_jax.game.moves import ACTIONS
from gtalign_jax.mesh import processes
from gtalign_jax.rollout.generator import numbers
from gtalign_jax.run.job import Job
from gtalign_jax.run.phase import Metrics
from gtalign_jax.run.score import Scored
from gtalign_jax.types import Rollout


def counters(job: Job) -> dict[str, float]:
    """What judges and servers have counted so far, over all hosts."""
    judged = {f"judge/{name}": n for name, n in job.judge_stats.numbers().items()}
    served = {f"engine/{name}": n for name, n in numbers(job.generator).items()}
    return processes.total(judged | served)


def counted(before: dict[str, float], after: dict[str, float]) -> Metrics:
    """What a step added to the counters; a peak is what it is."""
    peaks = {"judge/max_in_flight"}
    return {name: n - (0.0 if name in peaks else before.get(name, 0.0)) for name, n in after.items()}


def rollout_metrics(rollout: Rollout, scored: Scored) -> Metrics:
    """What the completions of a step were like; samples without a verdict count in no mean of a reward, those
    that did not come back from a server in none at all."""
    completions = rollout.completions
    f, action, reward = scored.batch.features, scored.batch.action, scored.reward
    valid, written = np.asarray(f.valid), completions.length > 0
    back = written.reshape(-1)
    metrics = {
        "reward/format": (f.format_ok & f.payoff_ok)[back].mean(),
        "reward/frontier": f.frontier[back].mean(),
        "length/mean": completions.length[written].mean(),
        "length/truncated": 1.0 - completions.finished[written].mean(),
        "judge/missing": 1.0 - valid.mean(),
        "tokens": int(completions.length.sum()),
    }
    acted = [a for a, came in zip(action, back, strict=True) if came]
    metrics |= {f"action/{name}": float(np.mean([a == name for a in acted])) for name in ACTIONS}
    tasks = np.array([item.task for item in scored.items])
    values = {"welfare": reward.welfare, "user": reward.user, "llm": reward.llm}
    for name, value in (values | {"answer": scored.batch.answer}).items():
        if valid.any():
            metrics[f"reward/{name}"] = value[valid].mean()
    for task in sorted(set(tasks[valid])):
        mine = valid & (tasks == task)
        metrics |= {f"reward/{name}/{task}": value[mine].mean() for name, value in values.items()}
    return metrics
