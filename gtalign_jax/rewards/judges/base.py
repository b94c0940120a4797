"""What a judge is asked and what it answers; every judge is `list[JudgeRequest] -> list[Verdict]`."""

import dataclasses
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """One response to be judged.

    task: one of `math, medium, ambig_qa, wildguard, minerva_math, ambig_coqa, advbench`.
    question: the user's intent as plain text. response: the text inside <response>.
    ground_truth: as stored in the dataset (a label, a reference text or an answer).
    """

    task: str
    question: str
    response: str
    ground_truth: str


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
