r"""Math: is the answer in a response equal to the truth? Decided without a network or a model.

The answer is the last whole \boxed{...}; without one, the last formula between dollar signs when the
truth is not a plain number; without that, the last number. Plain numbers are compared as numbers,
anything else by math-verify, on bounded input: its algebra would otherwise follow a hostile power tower
for ever. docs/rewards.md lists what counts as equal.
"""

import functools
import math
import re
import threading

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

MAX_ANSWER = 300
MAX_DIGITS = 40
MAX_EXPONENT = 20_000
SECONDS = 5
RELATIVE = 1e-6

_NUMBER = re.compile(r"-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?:/[0-9]+)?")
_PLAIN = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_SCIENTIFIC = re.compile(
    r"([+-]?[0-9]+(?:\.[0-9]+)?)\s*(?:\\times|\\cdot|\*|×)\s*10\s*\^\s*\{?\s*([+-]?[0-9]{1,3})\s*\}?"
)
_BOXED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_FORMULA = re.compile(r"\$([^$]+)\$")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,|\\,|\\!|,\\!\s*|\{,\})(?=[0-9]{3}(?![0-9]))")
_UNIT = re.compile(r"(?:\s|\\,|~)*(?:\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\%|%|\^\{?\\circ\}?|\\\$)\s*$")
_POWER = re.compile(r"\^\s*")
_CALL = re.compile(r"\bnp\.([a-z]+)")


def matches(response: str, truth: str) -> bool:
    """Whether the answer of `response` equals `truth`. An empty truth matches nothing."""
    truth = truth.strip()
    answer = find_answer(response, _number(truth) is not None) if truth else None
    return answer is not None and equal(answer, truth)


def find_answer(response: str, numeric: bool) -> str | None:
    """The text of the answer in a response; numeric: whether a plain number is expected."""
    answer = last_boxed(response)
    if answer is None and not numeric and (formulas := _FORMULA.findall(response)):
        answer = formulas[-1].strip()
    if answer is None:
        numbers = _NUMBER.findall(response)
        answer = numbers[-1] if numbers else response.strip()
    return answer if 0 < len(answer) <= MAX_ANSWER else None


def last_boxed(text: str) -> str | None:
    r"""The inside of the last \boxed{...} with balanced braces, or None; linear in the text.

    A box that never closes cannot lie inside one that does, so each is read only up to the next.
    """
    limit = len(text)
    for box in reversed(list(_BOXED.finditer(text))):
        start, end, limit = box.end(), limit, box.start()
        depth = 1
        for brace in _BRACE.finditer(text, start, end):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[start : brace.start()].strip()
    return None


def equal(answer: str, truth: str) -> bool:
    """Whether two answers are the same: as numbers when both are plain, else by math-verify."""
    mine, true = _number(answer), _number(truth)
    if mine is not None and true is not None:
        return mine == true or math.isclose(mine, true, rel_tol=RELATIVE)
    if " ".join(answer.split()) == " ".join(truth.split()):
        return True
    return _tame(answer) and _tame(truth) and _verified(answer, truth)


def _number(text: str) -> float | None:
    """A plain number: thousands, a unit in \\text{...}, % or degrees and a power of ten are allowed."""
    if len(text) > MAX_ANSWER:
        return None
    text = _UNIT.sub("", _THOUSANDS.sub("", text.strip().strip("$").removesuffix("."))).strip()
    if power := _SCIENTIFIC.fullmatch(text):
        text = f"{power.group(1)}e{power.group(2)}"
    value = float(text) if _PLAIN.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


def _tame(text: str) -> bool:
    """Whether exact algebra on this text stays small: short, no long numbers, no towers of powers."""
    if len(text) > MAX_ANSWER or re.search(rf"[0-9]{{{MAX_DIGITS}}}", text):
        return False
    if re.search(r"[0-9]{4,}\s*!|!\s*!|[)}]\s*!", text):
        return False
    text, size = text.replace("**", "^"), 1
    for power in _POWER.finditer(text):
        exponent = _group(text, power.end())
        if "^" in exponent:
            return False
        base = text[: power.start()].rstrip()[-1:]
        numbers = math.prod(int(n) for n in re.findall(r"[0-9]+", exponent))
        size = size * max(numbers, 1) if base in (")", "}", "]") else max(size, numbers)
        if size > MAX_EXPONENT:
            return False
    return True


def _group(text: str, start: int) -> str:
    """The exponent at `start`: a group in braces or parentheses, or one character."""
    if text[start : start + 1] not in ("{", "("):
        return text[start : start + 1]
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "{(") - (text[i] in "})")
        if depth == 0:
            return text[start : i + 1]
    return text[start:]


@functools.lru_cache(maxsize=4096)
def _verified(answer: str, truth: str) -> bool:
    # math-verify's own time limit is a signal, which only a main thread may set; elsewhere the bounds
    # of `_tame` stand alone.
    limit = SECONDS if threading.current_thread() is threading.main_thread() else None
    kinds = [LatexExtractionConfig(), ExprExtractionConfig()]

    def read(text: str) -> list:
        latex = _CALL.sub(r"\\\1", text)
        return parse(f"${latex}$", kinds, parsing_timeout=limit)

    return bool(verify(read(truth), read(answer), timeout_seconds=limit))
