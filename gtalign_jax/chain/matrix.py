"""The payoff matrix as text: read tolerantly, held strictly, and told exactly why it fails.

Reading takes JSON and Python-style literals (single or curly quotes, trailing commas, `+1`, `.5`), and
code fences when asked. Nothing is evaluated: a canonical matrix goes through the JSON parser, any other
through a flat reader of its own, so depth, size and time are bounded whatever the text is. What was read
must then be six cells of two finite numbers, each written once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

USER_MOVES, ACTIONS, PLAYERS = ("VQ", "DQ"), ("DA", "CQ", "AQ"), ("LLM", "user")
KEYS = tuple(sorted(f"{move}_{action}" for move in USER_MOVES for action in ACTIONS))
MAX_PAYOFF_CHARS = 4_000
MAX_PAYOFF = 1e6  # far above the written range of about [-5, 5], far below float32 trouble

Payoff = dict[str, dict[str, float]]

_QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'"})
_FENCE = re.compile(r"\s*```[A-Za-z0-9]*[ \t]*\n(.*)```\s*", re.DOTALL)
_TOKEN = re.compile(
    r"""\s*(?:(?P<mark>[{}:,])
      |"(?P<double>[^"\\\n]*)"
      |'(?P<single>[^'\\\n]*)'
      |(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
      |(?P<word>\w+))""",
    re.VERBOSE,
)
_CELLS = frozenset(KEYS)
_OBJECTS, _PAIRS = 1 + len(KEYS), len(KEYS) * (1 + len(PLAYERS))


class _Unreadable(Exception):
    """Why the flat reader stopped; never leaves this module."""


def parse_payoff(text: str, code_fences: bool = False) -> tuple[Payoff | None, list[str]]:
    """(matrix, []) or (None, reasons) for the text of a payoff block; never raises, linear time.

    code_fences: whether a matrix inside one ``` fence counts. A reason names the key and the value, or
    the character where reading stopped.
    """
    if len(text) > MAX_PAYOFF_CHARS:
        return None, [f"payoff: {len(text)} characters, over {MAX_PAYOFF_CHARS}"]
    if code_fences and (fenced := _FENCE.fullmatch(text)):
        text = fenced.group(1)
    text = (text if text.isascii() else text.translate(_QUOTES)).strip()
    payoff = _read_canonical(text)
    return (payoff, []) if payoff is not None else _read_tolerantly(text)


def to_array(payoff: Payoff) -> np.ndarray:
    """The matrix [2, 3, 2] float64 of a parsed payoff, in (user move, action, player) order."""
    return np.array(to_row(payoff), np.float64).reshape(len(USER_MOVES), len(ACTIONS), len(PLAYERS))


def to_row(payoff: Payoff) -> list[float]:
    """The same numbers as one flat list, in the array's order."""
    return [payoff[f"{m}_{a}"][p] for m in USER_MOVES for a in ACTIONS for p in PLAYERS]


def _read_canonical(text: str) -> Payoff | None:
    """The matrix of valid JSON, or None for the flat reader to find out why.

    The counts bound the depth before the parser runs, and show repeated keys, which it would merge.
    """
    if text.count("{") != _OBJECTS or text.count(":") != _PAIRS or "[" in text:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if type(value) is not dict or value.keys() != _CELLS:
        return None
    payoff = {}
    for key in KEYS:
        cell = value[key]
        if type(cell) is not dict or len(cell) != len(PLAYERS):
            return None
        payoff[key] = numbers = {}
        for player in PLAYERS:
            number = cell.get(player)
            # The type test leaves booleans out, the comparison NaN and infinities.
            if type(number) not in (float, int) or not -MAX_PAYOFF <= number <= MAX_PAYOFF:
                return None
            numbers[player] = float(number)
    return payoff


def _read_tolerantly(text: str) -> tuple[Payoff | None, list[str]]:
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
    return {key: {player: dict(cells[key])[player] for player in PLAYERS} for key in KEYS}, []


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
    scan, end = _TOKEN.scanner(text).match, 0
    while match := scan():
        kind, end = match.lastgroup, match.end()
        yield kind, match.group(kind), match.start(kind)
    if end < len(text):
        raise _Unreadable(f"unreadable at character {end}: {ascii(text[end : end + 12])}")
    yield "end", "", end


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
