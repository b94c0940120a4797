"""What a judge that writes nothing is asked: the rubric, the fields, and a label to be chosen.

The verdict follows from how likely the model finds each label as the next token. What the answers to a
question share stands first, so that it is computed once for all of them. `run.mesh_judge` runs the model.
"""

import dataclasses
import re

import numpy as np

from gtalign_jax.errors import UserError
from gtalign_jax.rewards.judges.base import JudgeRequest, Verdict
from gtalign_jax.rewards.judges.rubrics import FIELDS, ending_of, escape, tagged
from gtalign_jax.rewards.scale import Scale
from gtalign_jax.rewards.tasks import TASKS
from gtalign_jax.rewards.tasks.task import Tasks, named

DIGITS = "0123456789"


@dataclasses.dataclass(frozen=True)
class LabelPrompt:
    """system: the rubric. before, response, after: the user message; all answers to a question share what
    stands before. labels: a digit a level of the scale, whose scores are `scale.levels`."""

    system: str
    before: str
    response: str
    after: str
    labels: str
    scale: Scale


def label_prompt(request: JudgeRequest, tasks: Tasks = TASKS) -> LabelPrompt:
    """The question about a request. UserError for an unknown task, or a rubric that cannot be labelled."""
    task = named(tasks, request.task)
    rubric = task.rubric_for(request.ground_truth.strip())
    scale = rubric.scale or task.scale
    labels, text = _labelled(rubric.text, scale, task.name)
    fields = {"question": request.question} | ({"reference": rubric.reference} if rubric.reference else {})
    fields = {name: escape(field) for name, field in fields.items()}
    ending = ending_of(fields)
    return LabelPrompt(
        system=f"{text}\n\n{FIELDS}\nAnswer with your verdict alone: one of {', '.join(labels)}.",
        before=f"{tagged(fields, ending)}\n\n<response-{ending}>\n",
        response=escape(request.response),  # which cannot hold the closing tag, whatever its ending
        after=f"\n</response-{ending}>\n\nYour verdict, by the rubric alone:",
        labels=labels,
        scale=scale,
    )


def _labelled(rubric: str, scale: Scale, task: str) -> tuple[str, str]:
    """(labels, the rubric with them): levels that are digits label themselves, others are counted from 0."""
    levels = [f"{level:g}" for level in scale.levels]
    if all(level in DIGITS for level in levels):
        return "".join(levels), rubric
    if len(levels) > len(DIGITS):
        raise UserError(f"task {task!r}: a judge on the mesh tells up to 10 levels apart, not {len(levels)}")
    for label, level in zip(DIGITS, levels, strict=False):
        rubric, found = re.subn(
            rf"^{re.escape(level)}: ", f"{label}\0: ", rubric, count=1, flags=re.MULTILINE
        )
        if not found:
            raise UserError(
                f"task {task!r}: the rubric needs a line for level {level}, such as '{level}: ...'"
            )
    return DIGITS[: len(levels)], rubric.replace("\0", "")


def verdict_of(logp: np.ndarray, scale: Scale) -> Verdict:
    """The verdict of log-probabilities [K], a label a level.

    The expectation, where every score between two levels means something: between two levels, or on a scale
    that says so. Else the likeliest level.
    """
    if not np.isfinite(logp).all():
        return Verdict(None, "the judge's probabilities are not finite")
    chance = np.exp(logp - logp.max(), dtype=np.float64)
    chance /= chance.sum()
    if scale.between or len(scale.levels) == 2:
        return Verdict(float(chance @ np.array(scale.levels)), "label")
    return Verdict(scale.levels[int(np.argmax(chance))], "label")
