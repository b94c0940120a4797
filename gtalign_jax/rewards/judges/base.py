"""What a judge is asked and what it answers; every judge is `list[JudgeRequest] -> list[Verdict]`."""

import dataclasses
from collections.abc import Callable, Sequence

from gtalign_jax.rewards.tasks.task import Judged


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """One response to be judged.

    task: the name of one of the run's tasks.
    question: the user's intent as plain text. response: the text inside <response>.
    ground_truth: as stored in the dataset (a label, a reference text or an answer).
    item: what was asked, as the run holds it, for rules that need more of it.
    """

    task: str
    question: str
    response: str
    ground_truth: str
    item: Judged | None = None

    @property
    def intent(self) -> str:
        return self.question


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A judge's answer.

    score: on the task's own scale (math, ambig_qa 0/1; medium 0-4; wildguard 0/0.5/1), or None when
    no verdict could be had; then `reason` says why (`timeout`, `http 500`, `no verdict in the text`).
    """

    score: float | None
    reason: str = ""
    latency_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class ConsistencyRequest:
    """One analysis to be judged for Pareto consistency: the text of <payoff> and of <analyze>."""

    payoff: str
    analyze: str


Judge = Callable[[Sequence[JudgeRequest]], list[Verdict]]
ConsistencyJudge = Callable[[Sequence[ConsistencyRequest]], list[Verdict]]
