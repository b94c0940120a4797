"""How the published code reads a completion: four regular expressions and a literal parser.

Kept as it is (paper section 9): the first `<response>` counts wherever it stands, blocks may repeat,
text after the chain passes on a line of its own, NaN, Infinity and booleans are payoffs. Only the time
differs: the published format expression backtracks over all tag positions, this reading is linear.
"""

import ast
import dataclasses
import json
import re
import warnings
from typing import Any

KEYS = frozenset(f"{move}_{action}" for move in ("VQ", "DQ") for action in ("DA", "CQ", "AQ"))
PLAYERS = frozenset(("LLM", "user"))

_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"})
_BEGIN = "<thinking>"
# What must follow it, in this order, with anything between: the earliest match of each leaves the most
# room for the next, so taking each where it first ends decides the whole expression in one pass.
_JOINTS = tuple(
    re.compile(rf"</{left}>\s*<{right}>")
    for left, right in (("thinking", "payoff"), ("payoff", "analyze"), ("analyze", "response"))
)
_END = re.compile(r"</response>$", re.MULTILINE)

Matrix = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class PublishedChain:
    """response, analyze: inside of the first such block, or None. payoff: the matrix as the literal
    parser left it (numbers of any size, NaN, booleans), or None. format_ok: the format expression matches.
    reasoning_chars: characters before the first `<response>`. response_words, total_words: words between
    white space. errors: what is missing.
    """

    response: str | None
    analyze: str | None
    payoff: Matrix | None
    format_ok: bool
    reasoning_chars: int
    response_words: int
    total_words: int
    errors: tuple[str, ...]


def read_chain(text: str) -> PublishedChain:
    """Read any string; never raises, in time linear in its length."""
    blocks = {name: first_block(text, name) for name in ("response", "payoff", "analyze")}
    errors = [f"{name}: missing" for name, inside in blocks.items() if inside is None]
    payoff = None if blocks["payoff"] is None else read_payoff(blocks["payoff"])
    if payoff is None and blocks["payoff"] is not None:
        errors.append("payoff: not six cells of two numbers")
    format_ok = matches_format(text)
    if not format_ok:
        errors.append("text: does not match the published format")
    return PublishedChain(
        response=blocks["response"],
        analyze=blocks["analyze"],
        payoff=payoff,
        format_ok=format_ok,
        reasoning_chars=len(text.partition("<response>")[0]),
        response_words=len((blocks["response"] or "").split()),
        total_words=len(text.split()),
        errors=tuple(errors),
    )


def first_block(text: str, name: str) -> str | None:
    """What stands between the first `<name>` and the first `</name>` after it, or None."""
    _, opened, rest = text.partition(f"<{name}>")
    inside, closed, _ = rest.partition(f"</{name}>")
    return inside if opened and closed else None


def matches_format(text: str) -> bool:
    """Whether the text begins with the four blocks in order and the last ends a line.

    Nothing may stand before them, only white space between; what a block holds is not looked at.
    """
    if not text.startswith(_BEGIN):
        return False
    position = len(_BEGIN)
    for joint in _JOINTS:
        found = joint.search(text, position)
        if found is None:
            return False
        position = found.end()
    return _END.search(text, position) is not None


def read_payoff(text: str) -> Matrix | None:
    """The matrix of a payoff block as JSON, else as a Python literal; None unless it is six cells of two."""
    text = text.translate(_QUOTES).strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _python_literal(text)
    if not isinstance(value, dict) or value.keys() != KEYS:
        return None
    for cell in value.values():
        if not isinstance(cell, dict) or cell.keys() != PLAYERS:
            return None
        if not all(isinstance(number, int | float) for number in cell.values()):
            return None
    return value


def _python_literal(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # a model's odd literal is no fault of the caller
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
