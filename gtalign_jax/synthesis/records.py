"""The record of a prompt: the best of its candidates, and where each part of it came from."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from gtalign_jax.mesh import processes
from gtalign_jax.rewards.features import FeatureBatch, FeatureConfig, extract
from gtalign_jax.rewards.judges.base import ConsistencyJudge, Judge
from gtalign_jax.rewards.mutual_welfare import RewardConfig, RewardFn
from gtalign_jax.rewards.tasks.task import Tasks
from gtalign_jax.run.score import compute_reward, join_batches
from gtalign_jax.synthesis.candidates import Candidate
from gtalign_jax.synthesis.checks import chain_of
from gtalign_jax.synthesis.store import Fields


@dataclasses.dataclass(frozen=True, eq=False)
class Scoring:
    """What a candidate is worth: the reward, judge and features of the run."""

    reward_fn: RewardFn
    reward: RewardConfig
    features: FeatureConfig
    judge: Judge
    consistency: ConsistencyJudge | None
    tasks: Tasks


def make_records(candidates: Sequence[Candidate], count: int, scoring: Scoring) -> list[Fields]:
    """A record of each prompt, whose candidates stand `count` in a row.

    A verdict that is missing earns nothing: the welfare is what is certain without it. A record without a
    `chain` is of a prompt all of whose candidates were given up.
    """
    texts = ["" if candidate.rejected else chain_of(candidate.written) for candidate in candidates]
    batch = _features(texts, candidates, scoring)
    reward = jax.device_get(compute_reward(scoring.reward_fn, batch.features, scoring.reward))
    told = [
        _told(candidate, float(reward.welfare[i]), batch.verdicts[i].score, batch.action[i])
        for i, candidate in enumerate(candidates)
    ]
    firsts = range(0, len(candidates), count)
    return [_record(candidates[i : i + count], texts[i : i + count], told[i : i + count]) for i in firsts]


def _features(texts: Sequence[str], candidates: Sequence[Candidate], scoring: Scoring) -> FeatureBatch:
    """The features of all candidates; each host reads and judges its share."""
    mine = processes.part(len(texts))
    items = [candidate.item for candidate in candidates[mine]]
    config = dataclasses.replace(scoring.features, missing="zero", chain="gtalign")
    share = processes.on_each(
        lambda: extract(texts[mine], items, scoring.judge, config, scoring.consistency, scoring.tasks)
    )
    return join_batches(processes.all_gather(share))


def _told(candidate: Candidate, welfare: float, verdict: float | None, action: str | None) -> Fields:
    """What a record says of a candidate."""
    failures = {"failures": list(candidate.failures)} if candidate.failures else {}
    if candidate.rejected:
        return {"rejected": candidate.rejected, **failures}
    finite = welfare if math.isfinite(welfare) else None  # of a reward of one's own
    return {"welfare": finite, "verdict": verdict, "action": action, **failures}


def _record(candidates: Sequence[Candidate], texts: Sequence[str], told: Sequence[Fields]) -> Fields:
    item, digest = candidates[0].item, candidates[0].digest
    record: Fields = {
        "id": item.name or digest,
        "task": item.task,
        "messages": [dict(message) for message in item.messages],
        "truth": item.ground_truth,
        "intent": item.intent,
    }
    standing = [i for i, candidate in enumerate(candidates) if not candidate.rejected]
    if standing:
        kept = max(standing, key=lambda i: _order(told[i]["welfare"]))  # of equals the first
        origins = candidates[kept].origins
        record |= {
            "chain": texts[kept],
            "welfare": told[kept]["welfare"],
            "kept": kept,
            "components": {name: origin._asdict() for name, origin in origins.items()},
        }
    tokens = {side: sum(getattr(c, f"tokens_{side}") for c in candidates) for side in ("in", "out")}
    return {**record, "candidates": list(told), "tokens": tokens, "digest": digest}


def _order(welfare: float | None) -> float:
    """What is worth no number comes last."""
    return -math.inf if welfare is None else welfare
