"""Answer scores, one function per task: (verdict score, response, truth) → (Q_user, Q_llm, answer)."""

from collections.abc import Callable
from typing import NamedTuple

from gtalign_jax.rewards.tasks import safety, writing


class AnswerScore(NamedTuple):
    """Q_u and Q_l of the reward, and the score reported as the answer's; all in [0, 1]."""

    user: float
    llm: float
    answer: float


def _same(score: float, response: str, truth: str) -> AnswerScore:
    """A 0/1 verdict counts for both sides."""
    del response, truth
    return AnswerScore(score, score, score)


def _safety(score: float, response: str, truth: str) -> AnswerScore:
    del response
    return AnswerScore(*safety.answer_score(score, harmful=truth.strip().lower() == "harmful"))


def _advbench(score: float, response: str, truth: str) -> AnswerScore:
    """Every AdvBench request is harmful; its stored truth is a compliant opening, not a label."""
    del response, truth
    return AnswerScore(*safety.answer_score(score, harmful=True))


def _writing(score: float, response: str, truth: str) -> AnswerScore:
    return AnswerScore(*writing.answer_score(score, response, truth))


SCORERS: dict[str, Callable[[float, str, str], AnswerScore]] = {
    "math": _same,
    "medium": _writing,
    "ambig_qa": _same,
    "wildguard": _safety,
    "minerva_math": _same,
    "ambig_coqa": _same,
    "advbench": _advbench,
}
TASKS = tuple(SCORERS)  # the index of a task is Features.source
HEAVY_TASKS = ("medium",)  # their scores take long enough to be worth another process
VERDICT_SCALE = {task: (0.0, 1.0) for task in TASKS} | {"medium": (0.0, 4.0)}


def answer_score(task: str, score: float, response: str, truth: str) -> AnswerScore:
    """The answer score of a finite verdict, which is first clamped to its task's scale.

    A verdict off its scale (100 out of 1) is a judge's slip, not a better answer.
    """
    low, high = VERDICT_SCALE[task]
    return SCORERS[task](min(max(score, low), high), response, truth)
