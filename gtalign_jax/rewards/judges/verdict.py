r"""The verdict in a judge's text: the last \boxed{number} after its reasoning, on the task's own scale.

What cannot be read, or is off the scale, is a missing verdict with a reason; nothing is clamped or guessed.
"""

import re

from gtalign_jax.rewards.judges.base import Verdict
from gtalign_jax.rewards.scale import Scale
from gtalign_jax.rewards.tasks import TASKS
from gtalign_jax.rewards.tasks.task import Tasks, named

CONSISTENCY = Scale((0.0, 0.5, 1.0), tag="po")
NO_VERDICT = "no verdict in the judge's text"
UNFINISHED = "the judge's reasoning was cut off"

_BOX = r"\\boxed\s*\{"
_REASONING = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
# A plain decimal in ASCII digits, perhaps inside \text{}; then whatever closes the mark.
_NUMBER = re.compile(
    r"\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)[\s$}]*"
    r"(?:\}|</\w+>)",
    re.ASCII,
)


def read_verdict(text: str, task: str, tasks: Tasks = TASKS) -> Verdict:
    r"""The verdict in a judge's text, on the scale of `task` (paper section 4).

    The last \boxed{x} after the last closed reasoning block counts; ambiguity tasks may write
    <abg>x</abg> instead. Returns Verdict(None, reason) when there is none, when it is not a number, or
    when the number is not on the scale. Raises UserError on an unknown task.
    """
    return read_on_scale(text, named(tasks, task).scale)


def read_on_scale(text: str, scale: Scale) -> Verdict:
    """As `read_verdict`, on a given scale. Takes time linear in the text and never raises."""
    answer, finished = after_reasoning(text)
    mark = re.compile(f"{_BOX}|<{scale.tag}>" if scale.tag else _BOX, re.IGNORECASE)
    starts = [match.end() for match in mark.finditer(answer)]
    if not starts:
        return Verdict(None, NO_VERDICT if finished else UNFINISHED)
    inside = answer[starts[-1] : starts[-1] + 200]
    number = _NUMBER.match(inside)
    if number is None:
        return Verdict(None, f"the judge's verdict {inside[:20]!r} is not a number")
    value = float(number[1])
    if not scale.holds(value):
        return Verdict(None, f"the judge's verdict {value:g} is outside the scale {scale}")
    return Verdict(value + 0.0)  # no minus zero


def after_reasoning(text: str) -> tuple[str, bool]:
    """(what follows the last closed reasoning block, whether no block was left open).

    A closing tag without an opening one ends a reasoning that began in the judge's chat template.
    """
    tags = list(_REASONING.finditer(text))
    closed = [tag.end() for tag in tags if tag[1]]
    start = closed[-1] if closed else 0
    opened = [tag.start() for tag in tags if not tag[1] and tag.start() >= start]
    return (text[start : opened[0]], False) if opened else (text[start:], True)
