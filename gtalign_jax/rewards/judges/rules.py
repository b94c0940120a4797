"""A judge that needs no network: each task's own rule, on its own verdict scale.

The rules of our tasks read the surface only (`tasks.surface`), which is what embedded tasks and quick checks
need; a language model is the one to report numbers with.
"""

from collections.abc import Sequence

from gtalign_jax.errors import UserError
from gtalign_jax.rewards.judges.base import JudgeRequest, Verdict
from gtalign_jax.rewards.tasks import TASKS
from gtalign_jax.rewards.tasks.task import Tasks, named


def judge_by_rules(requests: Sequence[JudgeRequest], tasks: Tasks = TASKS) -> list[Verdict]:
    """One verdict a request, in order; missing where the rule gives none or one that is off the scale."""
    return [_verdict(request, tasks) for request in requests]


def check_rules(tasks: Tasks) -> None:
    """UserError when a task has no rule: without a server nobody could judge its answers."""
    for task in tasks.values():
        if task.rule is None:
            raise UserError(
                f"config.data.tasks: {task.name!r} has no rule; give it one, or name a server in "
                "config.judge.endpoints"
            )


def _verdict(request: JudgeRequest, tasks: Tasks) -> Verdict:
    task = named(tasks, request.task)
    if task.rule is None:
        return Verdict(None, f"task {task.name} has no rule")
    score = task.rule(request.response, request.ground_truth, request.item or request)
    if score is None:
        return Verdict(None, "the rule gives no verdict")
    if not isinstance(score, int | float):
        raise UserError(f"task {task.name!r}: its rule gave {score!r}; it must give a number or None")
    if not task.scale.holds(score):
        return Verdict(None, f"the rule's verdict {score:g} is outside the scale {task.scale}")
    return Verdict(float(score), "rule")
