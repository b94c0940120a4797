"""From a rollout to its reward: decoded, judged and rewarded, and the lines that record it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gtalign_jax.data.item import Item
from gtalign_jax.mesh import processes
from gtalign_jax.rewards.features import FeatureBatch, extract
from gtalign_jax.rewards.mutual_welfare import RewardConfig, RewardFn
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.run.job import Job
from gtalign_jax.run.rollouts import rollout_line
from gtalign_jax.types import Features, Reward, Rollout


@functools.partial(jax.jit, static_argnums=(0, 2))
def compute_reward(reward_fn: RewardFn, features: Features, config: RewardConfig) -> Reward:
    """The jitted reward of features [B]."""
    return reward_fn(features, config)


@dataclasses.dataclass(frozen=True)
class Scored:
    """A rollout's texts [B], what was read from them, and the reward (host arrays [B])."""

    texts: list[str]
    items: list[Item]
    batch: FeatureBatch
    reward: Reward


def score(job: Job, rollout: Rollout, items: Sequence[Item]) -> Scored:
    """Decode, judge and reward a rollout of P prompts; row p*G + g answers items[p].

    A row without tokens did not come back from its server: it is not valid, whatever a judge says of nothing.
    """
    return finish_score(job, rollout, items, judge_share(job, rollout, items))


def judge_share(job: Job, rollout: Rollout, items: Sequence[Item]) -> FeatureBatch:
    """What this host reads of its share of a rollout on the host; waits for the judge, uses no device."""
    texts = engine_lib.texts(job.engine, rollout)
    mine = processes.part(len(texts))
    repeated = _repeat(items, rollout)[mine]
    return extract(texts[mine], repeated, job.judge, job.settings.features, job.consistency)


def finish_score(job: Job, rollout: Rollout, items: Sequence[Item], share: FeatureBatch) -> Scored:
    """The shares of all hosts together, and their reward."""
    batch = join_batches(processes.all_gather(share))
    written = np.asarray(rollout.length).reshape(-1) > 0
    features = batch.features.replace(valid=batch.features.valid & written)
    batch = dataclasses.replace(batch, features=features)
    reward = jax.device_get(compute_reward(job.reward_fn, features, job.settings.reward))
    return Scored(engine_lib.texts(job.engine, rollout), _repeat(items, rollout), batch, reward)


def _repeat(items: Sequence[Item], rollout: Rollout) -> list[Item]:
    """The item of every row."""
    return [item for item in items for _ in range(rollout.completion.shape[1])]


def join_batches(parts: Sequence[FeatureBatch]) -> FeatureBatch:
    """The features of consecutive parts of a batch as those of the whole."""
    if len(parts) == 1:
        return parts[0]
    together = lambda name: sum((getattr(part, name) for part in parts), [])
    return FeatureBatch(
        features=jax.tree.map(lambda *x: np.concatenate(x), *(part.features for part in parts)),
        answer=np.concatenate([part.answer for part in parts]),
        **{name: together(name) for name in ("action", "verdicts", "chains")},
    )


def rollout_lines(job: Job, rollout: Rollout, scored: Scored, step: int) -> list[dict[str, Any]]:
    """The lines of a rollout file; a row that did not come back from its server has none."""
    length = np.asarray(rollout.length).reshape(-1)
    reward, features = scored.reward, scored.batch.features
    columns = {
        "score": reward.welfare,
        "answer_reward": scored.batch.answer,
        "user_reward": reward.user,
        "llm_reward": reward.llm,
        "utility": np.sqrt(reward.user * reward.llm),
    }
    # Without a verdict these are not known: they are written as null, and no mean counts them.
    known = {k: np.where(features.valid, np.asarray(v, np.float64), np.nan) for k, v in columns.items()}
    return [
        rollout_line(
            input=item.messages[-1]["content"],
            output=text,
            gts=item.ground_truth,
            source=item.source,
            step=step,
            format_reward=float(features.format_ok[i]),
            payoff_reward=float(reward.parts["payoff"][i]) if "payoff" in reward.parts else 0.0,
            pareto_score=float(features.frontier[i]),
            action=scored.batch.action[i],
            n_tokens=int(length[i]),
            verdict=scored.batch.verdicts[i],
            seen=item.seen,
            **{name: float(column[i]) for name, column in known.items()},
        )
        for i, (item, text) in enumerate(zip(scored.items, scored.texts, strict=True))
        if length[i] > 0
    ]
