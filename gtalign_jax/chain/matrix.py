"""The payoff matrix as text: read tolerantly, held strictly, and told exactly why it fails.

Reading takes JSON and Python-style literals (single or curly quotes, trailing commas, `+1`, `.5`), and
code fences when asked. Nothing is evaluated: a matrix in the instructed order is one regular expression,
any other text goes through a flat reader of two levels, so depth, size and time are bounded whatever the
text is. What was read must then be six cells of two finite numbers, each written once.
"""

import json
import operator
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from gtalign_jax.game.moves import ACTIONS, GTALIGN, KEYS, PLAYERS, USER_MOVES

MAX_PAYOFF_CHARS = 4_000
MAX_PAYOFF = 1e6  # far above the written range of about [-5, 5], far below float32 trouble

Payoff = dict[str, dict[str, float]]
Row = tuple[float, ...]

_QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'"})
_FENCE = re.compile(r"\s*```[A-Za-z0-9]*[ \t]*\n(.*)```\s*", re.DOTALL)
_TOKEN = re.compile(
    r"""\s*(?:(?P<mark>[{}:,])
      |(?P<double>"(?:[^"\\\n]|\\.)*")
      |'(?P<single>[^'\\\n]*)'
      |(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
      |(?P<word>\w+))""",
    re.VERBOSE,
)
_CELLS = frozenset(KEYS)
# Where each number of a row stands: the array's order, and its place in the written order.
_ORDER = tuple(
    (f"{move}_{action}", player) for move in USER_MOVES for action in ACTIONS for player in PLAYERS
)
_WRITTEN_ORDER = tuple((key, player) for key in KEYS for player in PLAYERS)
_in_array_order = operator.itemgetter(*(_WRITTEN_ORDER.index(place) for place in _ORDER))
# Possessive (`++`): nothing given back, so a mismatch is found in one pass.
_NUMBER = r"\s*+(-?+[0-9]++(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+)\s*+"
_WRITTEN = re.compile(
    r"\{\s*+"
    + r"\s*+,\s*+".join(
        rf'"{key}"\s*+:\s*+\{{\s*+' + r",\s*+".join(rf'"{p}"\s*+:{_NUMBER}' for p in PLAYERS) + r"\}"
        for key in KEYS
    )
    + r"\s*+\}"
)


class _Unreadable(Exception):
    """Why the flat reader stopped; never leaves this module."""


def parse_payoff(text: str, code_fences: bool = False) -> tuple[Payoff | None, list[str]]:
    """(matrix, []) or (None, reasons) for the text of a payoff block; never raises, linear time.

    code_fences: whether a matrix inside one ``` fence counts. A reason names the key and the value, or
    the character where reading stopped.
    """
    row, errors = parse_row(text, code_fences)
    return (None if row is None else to_payoff(row)), errors


def parse_row(text: str, code_fences: bool = False) -> tuple[Row | None, list[str]]:
    """`parse_payoff` with the matrix as its twelve numbers in the array's order."""
    if len(text) > MAX_PAYOFF_CHARS:
        return None, [f"payoff: {len(text)} characters, over {MAX_PAYOFF_CHARS}"]
    if code_fences and (fenced := _FENCE.fullmatch(text)):
        text = fenced.group(1)
    text = (text if text.isascii() else text.translate(_QUOTES)).strip()
    row = _read_written(text)
    return (row, []) if row is not None else _read_tolerantly(text)


def to_payoff(row: Row) -> Payoff:
    """{key: {player: number}} of twelve numbers, keys in sorted order."""
    payoff: Payoff = {key: {} for key in KEYS}
    for (key, player), number in zip(_ORDER, row, strict=True):
        payoff[key][player] = number
    return payoff


def to_array(payoff: Payoff) -> np.ndarray:
    """The matrix [2, 3, 2] float64 of a parsed payoff, in (user move, action, player) order."""
    row = [payoff[key][player] for key, player in _ORDER]
    return np.array(row, np.float64).reshape(GTALIGN.shape)


def _read_written(text: str) -> Row | None:
    """The numbers of a matrix in the instructed order, or None for the flat reader to look closer."""
    match = _WRITTEN.fullmatch(text)
    if match is None:
        return None
    numbers = list(map(float, match.groups()))
    # The sum is small only when no number is infinite or large; the flat reader says which one is.
    if sum(map(abs, numbers)) > MAX_PAYOFF:
        return None
    return _in_array_order(numbers)


def _read_tolerantly(text: str) -> tuple[Row | None, list[str]]:
    try:
        pairs = _whole(_tokens(text))
    except _Unreadable as why:
        return None, [f"payoff: {why}"]
    cells = dict(pairs)
    errors = [f"payoff.{key}: missing" for key in KEYS if key not in cells]
    names = [key for key, _ in pairs]
    for key in cells:
        if key not in _CELLS:
            errors.append(f"payoff.{_shown(key)}: not a cell")
        elif names.count(key) > 1:
            errors.append(f"payoff.{key}: written {names.count(key)} times")
        else:
            errors += _cell_errors(key, cells[key])
    if errors:
        return None, errors
    return tuple(dict(cells[key])[player] for key, player in _ORDER), []


def _cell_errors(key: str, cell: Any) -> list[str]:
    if not isinstance(cell, list) or sorted(player for player, _ in cell) != sorted(PLAYERS):
        return [f"payoff.{key}: must hold {' and '.join(PLAYERS)}, once each and nothing else"]
    return [
        f"payoff.{key}.{player}: {_shown(number)} is not a number within {MAX_PAYOFF:g}"
        for player, number in cell
        if not isinstance(number, float) or not -MAX_PAYOFF <= number <= MAX_PAYOFF
    ]


def _shown(value: Any) -> str:
    """A short ASCII form for a message, whatever the value is."""
    return ascii(value)[:24] if not isinstance(value, list) else "an object"


Token = tuple[str, str, int]
"""(kind, text, character)"""


def _tokens(text: str) -> Iterator[Token]:
    end = 0
    while match := _TOKEN.match(text, end):
        kind, end = str(match.lastgroup), match.end()  # every alternative has a name
        value, at = match.group(kind), match.start(kind)
        yield kind, _unescaped(value, at) if kind == "double" else value, at
    if end < len(text):
        raise _Unreadable(f"unreadable at character {end}: {ascii(text[end : end + 12])}")
    yield "end", "", end


def _unescaped(quoted: str, at: int) -> str:
    """The inside of a string in double quotes."""
    if "\\" not in quoted:
        return quoted[1:-1]
    try:
        return json.loads(quoted)
    except ValueError as error:
        raise _Unreadable(f"a broken string stands at character {at}") from error


def _whole(tokens: Iterator[Token]) -> list[tuple[str, Any]]:
    """Pairs of the one object that the text is; values are floats, lists of pairs, or words."""
    if next(tokens)[:2] != ("mark", "{"):
        raise _Unreadable("not a JSON object")
    pairs = _pairs(tokens, nested=True)
    if (after := next(tokens))[0] != "end":
        raise _Unreadable(f"text after the object at character {after[2]}")
    return pairs


def _pairs(tokens: Iterator[Token], nested: bool) -> list[tuple[str, Any]]:
    """The pairs of an object whose brace was read; nested: whether values may be objects."""
    pairs: list[tuple[str, Any]] = []
    while True:
        kind, key, at = next(tokens)
        if (kind, key) == ("mark", "}"):
            return pairs
        if kind not in ("double", "single"):
            raise _Unreadable(f"a quoted key should stand at character {at}")
        kind, colon, at = next(tokens)
        if (kind, colon) != ("mark", ":"):
            raise _Unreadable(f"':' should follow {_shown(key)} at character {at}")
        kind, value, at = next(tokens)
        if (kind, value) == ("mark", "{") and nested:
            pairs.append((key, _pairs(tokens, nested=False)))
        elif kind in ("mark", "end"):
            raise _Unreadable(f"a value should stand at character {at}")
        else:
            pairs.append((key, float(value) if kind == "number" else value))
        kind, mark, at = next(tokens)
        if (kind, mark) == ("mark", "}"):
            return pairs
        if (kind, mark) != ("mark", ","):
            raise _Unreadable(f"',' or '}}' should stand at character {at}")
