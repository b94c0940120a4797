"""Ambiguity: what the stored truths mean, and the rule that judges a response without a model.

A truth is `multipleQAs###...Meaning 0: q; Answer 0: a ...`, `singleAnswer###a`, or a bare label
(`ambiguous`, `non_ambiguous`). The verdict is 1 when an ambiguous question is met with a clarifying
question or with its interpretations, any other with a direct answer; it counts for both sides.
"""

import re

_MEANING = re.compile(r"Answer \d+:\s*([^\n]+)")
_HEDGES = re.compile(r"\b(?:if you mean|depends on|either|could mean|it could be)\b", re.IGNORECASE)
_WORD = re.compile(r"\w+")


def is_ambiguous(truth: str) -> bool:
    """Whether the truth says that the question has several readings."""
    return truth.startswith("multipleQAs") or truth.strip().lower() == "ambiguous"


def stored_answers(truth: str) -> list[str]:
    """The answers a truth stores, one a reading; none when it is a bare label."""
    _, _, stored = truth.partition("###")
    listed = _MEANING.findall(stored) or re.split(r"[|;]", stored)
    return [answer.strip() for answer in listed if answer.strip()]


def verdict(response: str, truth: str) -> float:
    """0 or 1 by surface form: see the module's docstring."""
    text = response.strip()
    asks = text.endswith("?")
    if is_ambiguous(truth):
        covered = {answer for answer in stored_answers(truth) if _mentions(text, answer)}
        return float(asks or bool(_HEDGES.search(text)) or len(covered) >= 2)
    only_asks = asks and len([part for part in re.split(r"[.!?]+", text) if part.strip()]) == 1
    answers = stored_answers(truth)
    return float(bool(text) and not only_asks and (not answers or any(_mentions(text, a) for a in answers)))


def _mentions(text: str, answer: str) -> bool:
    """Whether the words of an answer stand in a text, in order and side by side."""
    inside, wanted = (" ".join(_WORD.findall(t.lower())) for t in (text, answer))
    return bool(wanted) and f" {wanted} " in f" {inside} "
