"""From text to numbers: the last host step before the jitted reward.

Completions are parsed, judged and measured; what comes out has a fixed schema, whatever the text was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gtalign_jax.chain.parse import ACTIONS, Chain, chosen_action, parse_chain, payoff_array
from gtalign_jax.errors import UserError
from gtalign_jax.game.payoff import pareto_frontier
from gtalign_jax.rewards.judges.base import Judge, JudgeRequest, Verdict
from gtalign_jax.rewards.tasks import SCORERS, TASKS
from gtalign_jax.types import Features


class Judged(Protocol):
    """What features need to know of an item."""

    task: str
    intent: str
    ground_truth: str


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """missing: what a missing verdict does, `drop` the sample from training or count it as `zero`."""

    missing: str = "drop"

    def __post_init__(self):
        if self.missing not in ("drop", "zero"):
            raise UserError(f"features.missing={self.missing!r}: must be drop or zero")


@dataclasses.dataclass(frozen=True)
class FeatureBatch:
    """features: NumPy arrays [B]. answer [B]: reported answer score. action: DA, CQ, AQ or None."""

    features: Features
    answer: np.ndarray
    action: list[str | None]
    verdicts: list[Verdict]
    chains: list[Chain]


def extract(
    completions: Sequence[str], items: Sequence[Judged], judge: Judge, config: FeatureConfig
) -> FeatureBatch:
    """Features of completions [B] that answer items [B].

    Only completions with a response and a valid matrix are judged: the others earn nothing either way.
    """
    chains = [parse_chain(text) for text in completions]
    verdicts = _verdicts(chains, items, judge)
    answers = np.zeros((len(chains), 3), np.float32)
    for i, (chain, item, verdict) in enumerate(zip(chains, items, verdicts, strict=True)):
        if verdict.score is not None and chain.reward_ok:
            answers[i] = SCORERS[item.task](verdict.score, chain.response, item.ground_truth)
    missing = np.array([v.score is None for v in verdicts])
    matrices = [payoff_array(chain) for chain in chains]
    payoff = np.stack([matrix for matrix, _ in matrices]).astype(np.float32)
    action = [chosen_action(chain.analyze) for chain in chains]
    due = np.array([chain.reward_ok for chain in chains])
    features = Features(
        valid=~missing if config.missing == "drop" else np.ones(len(chains), bool),
        format_ok=np.array([chain.format_ok for chain in chains]),
        answer_user=answers[:, 0],
        answer_llm=answers[:, 1],
        payoff=payoff,
        payoff_ok=due,
        frontier=frontier_consistency(payoff, action) * due,
        reasoning_chars=np.array([_reasoning_chars(text) for text in completions], np.float32),
        response_words=np.array([_words(chain.response) for chain in chains], np.float32),
        total_words=np.array([_words(text) for text in completions], np.float32),
        source=np.array([TASKS.index(item.task) for item in items], np.int32),
    )
    return FeatureBatch(features, answers[:, 2], action, verdicts, chains)


def frontier_consistency(payoff: np.ndarray, action: Sequence[str | None]) -> np.ndarray:
    """P [B] in {0, 1}: the action named in <analyze> has a cell on the frontier of its own matrix."""
    on_frontier = np.asarray(pareto_frontier(payoff)).any(axis=-2)  # [B, A]
    index = np.array([ACTIONS.index(a) if a else -1 for a in action])
    return np.where(index >= 0, on_frontier[np.arange(len(index)), index], False).astype(np.float32)


def _verdicts(chains: Sequence[Chain], items: Sequence[Judged], judge: Judge) -> list[Verdict]:
    asked = [i for i, chain in enumerate(chains) if chain.reward_ok]
    requests = [
        JudgeRequest(items[i].task, items[i].intent, chains[i].response or "", items[i].ground_truth)
        for i in asked
    ]
    verdicts = [Verdict(0.0, "not judged: no response or no valid matrix")] * len(chains)
    for i, verdict in zip(asked, judge(requests), strict=True):
        verdicts[i] = verdict
    return verdicts


def _reasoning_chars(text: str) -> int:
    """Characters before the first <response>: what the user waits for."""
    return len(text.partition("<response>")[0])


def _words(text: str | None) -> int:
    return len((text or "").split())
