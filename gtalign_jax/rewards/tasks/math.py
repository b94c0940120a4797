"""Math: is the answer in a response equal to the truth? Decided by math-verify, without a network."""

from __future__ import annotations

import functools
import re

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?")
_PLAIN = re.compile(r"-?\d+(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\s*\{")


@functools.lru_cache(maxsize=65536)
def matches(response: str, truth: str) -> bool:
    """Whether the last boxed answer, or else the last number, of `response` equals `truth`.

    Plain numbers are compared as numbers; anything else is parsed as LaTeX by math-verify. An empty
    truth matches nothing.
    """
    truth = truth.strip()
    if not truth:
        return False
    answer = last_boxed(response)
    if answer is None:
        numbers = _NUMBER.findall(response)
        answer = numbers[-1] if numbers else response
    if _PLAIN.fullmatch(truth) and _PLAIN.fullmatch(answer.strip().replace(",", "")):
        return float(answer.replace(",", "")) == float(truth)
    return _verified(answer, truth)


def last_boxed(text: str) -> str | None:
    r"""The inside of the last \boxed{...} with balanced braces, or None."""
    for start in reversed([m.end() for m in _BOXED.finditer(text)]):
        depth = 1
        for i in range(start, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start:i].strip()
    return None


def _verified(answer: str, truth: str) -> bool:
    # The library's own timeouts use signals, which only the main thread may set: inputs are bounded
    # instead.
    if len(answer) > 500 or len(truth) > 500:
        return False
    kinds = [LatexExtractionConfig(), ExprExtractionConfig()]
    read = lambda text: parse(f"${text}$", kinds, parsing_timeout=None)
    return bool(verify(read(truth), read(answer), timeout_seconds=None))
