"""From text to numbers: the last host step before the jitted reward.

Completions are parsed, judged and measured; what comes out has a fixed schema, whatever the text was.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gtalign_jax.chain.parse import Chain, named_choice
from gtalign_jax.errors import UserError, in_range
from gtalign_jax.game.moves import ACTIONS, GTALIGN, USER_MOVES
from gtalign_jax.game.payoff import pareto_frontier
from gtalign_jax.rewards import reading
from gtalign_jax.rewards.judges.base import (
    ConsistencyJudge,
    ConsistencyRequest,
    Judge,
    JudgeRequest,
    Verdict,
)
from gtalign_jax.rewards.tasks import TASKS
from gtalign_jax.rewards.tasks.task import Judged, Task, Tasks, named
from gtalign_jax.types import Features

_NOTHING = (0.0,) * math.prod(GTALIGN.shape)


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """How completions become numbers.

    missing: what a missing verdict does, `drop` the sample from training or count it as `zero`.
    chain: `gtalign`, the four blocks; or `plain`, the baseline without them: the whole completion is the
    response, and the format, payoff and frontier terms are zero.
    frontier: who decides P, our `solver` or a `judge` that reads <payoff> and <analyze>.
    code_fences: whether a matrix inside a ``` fence counts. workers: processes that read texts and
    compute BLEU; 0 does it here.
    """

    missing: str = "drop"
    chain: str = "gtalign"
    frontier: str = "solver"
    code_fences: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        known = {"missing": ("drop", "zero"), "chain": ("gtalign", "plain"), "frontier": ("solver", "judge")}
        for name, choices in known.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}={value!r}: must be {' or '.join(choices)}")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}: must be 0 or more")
        in_range(self, workers=(0, 1024))

    @property
    def plain(self) -> bool:
        """Whether completions are answers without a chain."""
        return self.chain == "plain"


@dataclasses.dataclass(frozen=True)
class FeatureBatch:
    """features: NumPy arrays [B]. answer [B]: reported answer score. action: DA, CQ, AQ or None."""

    features: Features
    answer: np.ndarray
    action: list[str | None]
    verdicts: list[Verdict]
    chains: list[Chain]


def extract(
    completions: Sequence[str],
    items: Sequence[Judged],
    judge: Judge,
    config: FeatureConfig,
    consistency: ConsistencyJudge | None = None,
    tasks: Tasks = TASKS,
) -> FeatureBatch:
    """Features of completions [B] that answer items [B] of these tasks.

    Only completions with a response and a valid matrix are judged: the others earn nothing either way.
    consistency: decides P in place of our solver; where it gives no verdict the sample is missing.
    Raises UserError when a judge does not give one verdict a request, or for an item of another task
    or a task's score outside [0, 1].
    """
    asked, place = [named(tasks, item.task) for item in items], {name: i for i, name in enumerate(tasks)}
    plain = config.plain
    read = reading.read_plain if plain else functools.partial(reading.read, code_fences=config.code_fences)
    readings = reading.spread(read, completions, config.workers)
    chains = [r.chain for r in readings]
    due = [c.response is not None and (plain or c.row is not None) for c in chains]
    verdicts = _verdicts(chains, due, items, judge)
    answers, missing = _answers(chains, due, verdicts, list(zip(items, asked, strict=True)), config.workers)
    rows = [c.row if d and c.row else _NOTHING for c, d in zip(chains, due, strict=True)]
    payoff = np.array(rows, np.float64).reshape(-1, *GTALIGN.shape)
    choice = [None if plain else named_choice(c.analyze) for c in chains]
    action = [None if c is None else GTALIGN.split(c)[1] for c in choice]
    frontier = frontier_consistency(payoff, choice)
    if consistency is not None and not plain:
        frontier, unjudged = _judged_consistency(chains, due, consistency)
        missing |= unjudged
    payoff_ok = np.array(due, bool)
    features = Features(
        valid=~missing if config.missing == "drop" else np.ones(len(chains), bool),
        format_ok=np.array([c.format_ok for c in chains], bool),
        answer_user=answers[:, 0],
        answer_llm=answers[:, 1],
        payoff=payoff.astype(np.float32),
        payoff_ok=payoff_ok,
        frontier=frontier * payoff_ok,
        reasoning_chars=np.array([r.reasoning_chars for r in readings], np.float32),
        response_words=reading.count_words([c.response for c in chains]).astype(np.float32),
        total_words=reading.count_words(completions).astype(np.float32),
        source=np.array([place[item.task] for item in items], np.int32),
        analyze_ok=np.array([plain or c.analyze is not None for c in chains], bool),
    )
    return FeatureBatch(features, answers[:, 2], action, verdicts, chains)


def frontier_consistency(payoff: np.ndarray, choice: Sequence[str | None]) -> np.ndarray:
    """P [B] in {0, 0.5, 1}: whether what <analyze> settles on lies on the frontier of its own matrix.

    payoff [B, 2, 3, 2]; choice [B]: the action (`AQ`) or cell (`DQ_AQ`) named last, or None.
    1: that cell is on the Pareto frontier, or, for an action, one of its cells is. 0.5: the cell is not,
    but the other cell of the same action is: the right action for a wrong reason. 0 otherwise.
    """
    # On the host, because a jitted call would compile anew for each batch size.
    on_frontier = pareto_frontier(np.asarray(payoff, np.float64))
    names = [GTALIGN.split(c) if c else (None, ACTIONS[0]) for c in choice]
    index = np.array([ACTIONS.index(action) for _, action in names], int)
    moves = np.array([-1 if move is None else USER_MOVES.index(move) for move, _ in names], int)
    rows = np.arange(len(index))
    action_on = on_frontier.any(axis=1)[rows, index]
    cell_on = np.where(moves < 0, action_on, on_frontier[rows, moves, index])
    named = np.array([c is not None for c in choice], bool)
    return (named * np.where(cell_on, 1.0, 0.5 * action_on)).astype(np.float32)


def _judged_consistency(
    chains: Sequence[Chain], due: Sequence[bool], judge: ConsistencyJudge
) -> tuple[np.ndarray, np.ndarray]:
    """(P [B] float32, which verdicts are missing [B]) from a judge; P is 0 without an <analyze>."""
    asked = {
        i: ConsistencyRequest(c.payoff_text, c.analyze)
        for i, c in enumerate(chains)
        if due[i] and c.payoff_text is not None and c.analyze is not None
    }
    given = _one_each(judge, list(asked.values()))
    p, missing = np.zeros(len(chains), np.float32), np.zeros(len(chains), bool)
    for i, verdict in zip(asked, given, strict=True):
        missing[i] = verdict.score is None
        p[i] = 0.0 if verdict.score is None else verdict.score
    return p, missing


def _one_each(judge: Callable[[Sequence[Any]], list[Verdict]], requests: Sequence[Any]) -> list[Verdict]:
    given = judge(requests)
    if len(given) != len(requests):
        raise UserError(f"judge: {len(given)} verdicts for {len(requests)} requests; one each is due")
    return given


def _verdicts(
    chains: Sequence[Chain], due: Sequence[bool], items: Sequence[Judged], judge: Judge
) -> list[Verdict]:
    asked = [i for i, is_due in enumerate(due) if is_due]
    requests = [
        JudgeRequest(
            items[i].task, items[i].intent, chains[i].response or "", items[i].ground_truth, items[i]
        )
        for i in asked
    ]
    given = _one_each(judge, requests)
    verdicts = [Verdict(0.0, "not judged: no response or no valid matrix")] * len(chains)
    for i, verdict in zip(asked, given, strict=True):
        verdicts[i] = verdict
    return verdicts


def _answers(
    chains: Sequence[Chain],
    due: Sequence[bool],
    verdicts: Sequence[Verdict],
    items: Sequence[tuple[Judged, Task]],
    workers: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(Q_u, Q_l, reported score) [B, 3] float32, and which verdicts are missing [B]."""
    missing = np.array([v.score is None or not math.isfinite(v.score) for v in verdicts], bool)
    inputs = {
        i: reading.Answer(task.score, task.scale.ends, verdict.score, chain.response, item.ground_truth)
        for i, (verdict, chain, (item, task)) in enumerate(zip(verdicts, chains, items, strict=True))
        if due[i] and not missing[i] and verdict.score is not None and chain.response is not None
    }
    answers = np.zeros((len(chains), 3), np.float32)
    if inputs:
        # Little but BLEU is worth the way to another process and back.
        heavy = any(items[i][1].heavy for i in inputs)
        scored = reading.spread(reading.score, list(inputs.values()), workers if heavy else 0)
        answers[list(inputs)] = scored
    for i in np.flatnonzero(~((answers >= 0) & (answers <= 1)).all(axis=1)).tolist():
        name, found = items[i][1].name, tuple(answers[i].tolist())
        raise UserError(f"task {name!r}: its score gave {found}; all three must be from 0 to 1")
    return answers, missing
