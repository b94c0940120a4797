r"""Math: is the answer in a response equal to the truth? Decided without a network or a model.

The answer is the last whole \boxed{...}; without one, the last formula between dollar signs when the
truth is not a plain number; without that, the last number. Plain numbers are compared as numbers, formulas by
`algebra`, within its limits, and what is no formula as a whole as text. docs/rewards.md lists what counts as
equal.
"""

import functools
import math
import re
import unicodedata
from decimal import Decimal

import numpy as np

from gtalign_jax.data.item import Item, Record, make_item, read_question, text_of
from gtalign_jax.rewards.tasks import algebra, surface
from gtalign_jax.rewards.tasks.replies import math as replies
from gtalign_jax.rewards.tasks.task import Judged, Task, reader

MAX_ANSWER = 300
MAX_DIGITS = 40
MAX_EXPONENT = 20_000
MAX_SYMBOLIC_EXPONENT = 5_000
RELATIVE = Decimal("1e-6")

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
_FOREIGN = re.compile(r"[^\x00-\x7f]+")
_SCRIPT = {"<super>": "^", "<sub>": "_"}
_DASH = re.compile(r"(?<![\w)}\]])[\u2010\u2011\u2013]\s?(?=[0-9.])")
_OPEN_POINT = re.compile(r"(?<=[0-9])\.(?![0-9.])")
_UPRIGHT = re.compile(r"\\(?:mathrm|rm|text)\s*\{\s*([ei])\s*\}")
_LOOSE = re.compile(r"\s+|\\[,;:! ]|\\(?:left|right)(?![a-zA-Z])")
_CALL = re.compile(r"\bnp\.([a-z]+)")


def matches(response: str, truth: str) -> bool:
    """Whether the answer of `response` equals `truth`, or one of its lines: those are alternatives.

    An empty truth matches nothing.
    """
    lines = [] if "\\begin" in truth else truth.strip().splitlines()  # a matrix may stand in several lines
    return any(_matches(response, each) for each in (lines if len(lines) > 1 else [truth]))


def _matches(response: str, truth: str) -> bool:
    truth = ascii_text(truth).strip()
    answer = find_answer(ascii_text(response), _number(truth) is not None) if truth else None
    return answer is not None and equal(answer, truth)


def ascii_text(text: str) -> str:
    """The text with Unicode's minus signs, digits, wide letters and raised numbers as LaTeX writes them."""
    if text.isascii():
        return text
    return _FOREIGN.sub(lambda run: "".join(map(_plain_sign, run.group())), _DASH.sub("-", text))


def _plain_sign(sign: str) -> str:
    if sign == "\u2212":
        return "-"
    if (digit := unicodedata.decimal(sign, None)) is not None:
        return str(digit)
    kind = unicodedata.decomposition(sign).partition(" ")[0]
    if kind == "<fraction>":  # 3½ is not 31/2
        return sign
    plain = unicodedata.normalize("NFKC", sign).replace("\u2212", "-")
    return f"{_SCRIPT[kind]}{{{plain}}}" if kind in _SCRIPT else plain


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
    """Whether two answers are the same: plain numbers as numbers, else as text or by algebra."""
    answer, truth = ascii_text(answer), ascii_text(truth)
    mine, true = _number(answer), _number(truth)
    if mine is not None and true is not None:
        return _near(mine, true)
    if _LOOSE.sub("", answer) == _LOOSE.sub("", truth):
        return True
    return _tame(answer) and _tame(truth) and _verified(answer, truth)


def _near(mine: Decimal, true: Decimal) -> bool:
    """Whole numbers exactly; decimals within RELATIVE, and never by more than their last digit given."""
    if mine == true:
        return True
    units = [Decimal(1).scaleb(e) for e in (_exponent(mine), _exponent(true)) if e]
    bound = RELATIVE * max(abs(mine), abs(true))
    return bool(units) and abs(mine - true) <= min(bound, max(units))


def _exponent(number: Decimal) -> int:
    exponent = number.as_tuple().exponent
    return exponent if isinstance(exponent, int) else 0


def _number(text: str) -> Decimal | None:
    """A plain number: thousands, a unit in \\text{...}, % or degrees and a power of ten are allowed."""
    if len(text) > MAX_ANSWER:
        return None
    text = _UNIT.sub("", _THOUSANDS.sub("", text.strip().strip("$").removesuffix("."))).strip()
    if power := _SCIENTIFIC.fullmatch(text):
        text = f"{power.group(1)}e{power.group(2)}"
    return Decimal(text) if _PLAIN.fullmatch(text) else None


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
        if size > (MAX_EXPONENT if base.isdigit() else MAX_SYMBOLIC_EXPONENT):
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
    return algebra.WORKER.same(_latex(answer), _latex(truth))


def _latex(text: str) -> str:
    """A formula as the parser reads it whole: np.f as \\f, 3. as 3, an upright e as e, no dollars around."""
    text = _CALL.sub(r"\\\1", text.strip().strip("$"))
    return _UPRIGHT.sub(r"{\1}", _OPEN_POINT.sub("", text))


_MATH = """\
Decide whether the response solves the problem. Compare its final answer with the reference, which is right.
1: the final answer equals the reference as a mathematical object, whatever its form (1/2 and 0.5, reordered \
sets, omitted units that the problem names).
0: it differs, several answers are offered, or there is none. A question back to the user is no answer.
Do not reward the method, only the final answer."""

_MINERVA = """\
Decide whether the response solves the science problem. Compare its final answer with the reference.
1: the same quantity: equal in value after conversion of units and rounding to the digits of the reference, \
or an equivalent formula.
0: it differs, several answers are offered, or there is none. A question back to the user is no answer.
Do not reward the method, only the final answer."""

HARDEST = "Level 5"  # what the paper trains on


def by_answer(response: str, truth: str, item: Judged) -> float:
    """Whether the answer is right, whatever stands around it."""
    del item
    return float(matches(response, truth))


def _rule(response: str, truth: str, item: Judged) -> float | None:
    """`by_answer`; a right answer in a text that does not read, or cannot be told to, has no verdict."""
    if not matches(response, truth) or surface.copies(response, item.intent):
        return 0.0
    return 1.0 if surface.reads(response) else None


def _respond(item: Item, action: str, correct: bool, rng: np.random.Generator) -> str:
    del correct
    return replies.solve(item, action, rng)


def _read_math(record: Record) -> Item | None:
    """MATH's own records (problem, level, type, solution); those below level 5 are not for us."""
    if text_of(record, "level") != HARDEST:
        return None
    return _solved(record)


def _solved(record: Record) -> Item | None:
    """A problem and its solution, in which the truth stands last in a box; Minerva-Math's own records too."""
    truth = last_boxed(text_of(record, "solution"))
    if truth is None:
        raise ValueError("solution: holds no \\boxed{...} that closes; give the answer as truth")
    return make_item([{"role": "user", "content": text_of(record, "problem")}], truth)


_plain = functools.partial(read_question, several="\n")  # alternatives

MATH = Task(
    name="math",
    source="math-hard",
    read=reader(_read_math, ("problem", "level", "solution"), _plain, in_rows="\n"),
    rule=_rule,
    rubric=_MATH,
    respond=_respond,
    consider=replies.consider,
)
MINERVA_MATH = Task(
    name="minerva_math",
    source="minerva",
    read=reader(_solved, ("problem", "solution"), _plain, in_rows="\n"),
    rule=_rule,
    rubric=_MINERVA,
    respond=_respond,
    consider=replies.consider,
)
