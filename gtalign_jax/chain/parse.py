"""From a completion to its four blocks and payoff matrix: total, linear-time, and it says why not.

Reading is tolerant (JSON, Python-style literals, curly quotes); what was read is then held to the
format: the four blocks once each, in order, nothing else; six cells of two finite numbers.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
from typing import Any

import numpy as np

BLOCKS = ("thinking", "payoff", "analyze", "response")
USER_MOVES, ACTIONS, PLAYERS = ("VQ", "DQ"), ("DA", "CQ", "AQ"), ("LLM", "user")
KEYS = tuple(sorted(f"{move}_{action}" for move in USER_MOVES for action in ACTIONS))
MAX_CHARS = 200_000
MAX_PAYOFF_CHARS = 4_000

_TAG = re.compile(r"<(/?)(thinking|payoff|analyze|response)>")
_QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'"})
_CHOICE = re.compile(r"\b(?:(?:VQ|DQ)_)?(DA|CQ|AQ)\b")

Payoff = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Chain:
    """A parsed completion. A block that is absent, repeated or nested is None, and `errors` says so.

    format_ok: the four blocks once each, in order, with only white space between and around them.
    payoff: the valid matrix as {key: {"LLM": x, "user": y}}, or None.
    """

    thinking: str | None
    payoff_text: str | None
    analyze: str | None
    response: str | None
    payoff: Payoff | None
    format_ok: bool
    errors: tuple[str, ...]

    @property
    def reward_ok(self) -> bool:
        """Whether any reward is due: a response and a valid matrix (paper section 3)."""
        return self.response is not None and self.payoff is not None


def parse_chain(text: str) -> Chain:
    """Parse any string; never raises, and takes time linear in its length."""
    errors: list[str] = []
    if len(text) > MAX_CHARS:
        errors.append(f"text: {len(text)} characters, over {MAX_CHARS}")
        text = text[:MAX_CHARS]
    blocks, order_ok = _split_blocks(text, errors)
    payoff = None
    if blocks["payoff"] is not None:
        payoff, payoff_errors = parse_payoff(blocks["payoff"])
        errors += payoff_errors
    return Chain(
        thinking=blocks["thinking"],
        payoff_text=blocks["payoff"],
        analyze=blocks["analyze"],
        response=blocks["response"],
        payoff=payoff,
        format_ok=order_ok and all(block is not None for block in blocks.values()),
        errors=tuple(errors),
    )


def _split_blocks(text: str, errors: list[str]) -> tuple[dict[str, str | None], bool]:
    """The inside of each block that is whole and stands once, and whether all is in its place."""
    found: dict[str, list[str]] = {name: [] for name in BLOCKS}
    open_name, open_end, outside_from, order = None, 0, 0, []
    clean = True
    for tag in _TAG.finditer(text):
        closing, name = tag.group(1) == "/", tag.group(2)
        if open_name is None and not closing:
            clean &= not text[outside_from : tag.start()].strip()
            open_name, open_end = name, tag.end()
        elif open_name == name and closing:
            found[name].append(text[open_end : tag.start()])
            order.append(name)
            open_name, outside_from = None, tag.end()
        elif open_name is None:
            errors.append(f"{name}: closed at character {tag.start()} without being opened")
            clean, outside_from = False, tag.end()
        else:
            # A tag inside another block could hide a second answer from the judge: neither counts.
            errors.append(f"{open_name}: <{tag.group(1)}{name}> inside it at character {tag.start()}")
            found[open_name] += ["", ""]
            clean, open_name, outside_from = False, None, tag.end()
    if open_name is not None:
        errors.append(f"{open_name}: never closed")
    elif text[outside_from:].strip():
        clean = False
    if not clean:
        errors.append("text: something stands outside the four blocks")
    blocks: dict[str, str | None] = {}
    for name, parts in found.items():
        blocks[name] = parts[0].strip() if len(parts) == 1 else None
        if len(parts) != 1:
            errors.append(f"{name}: " + ("missing" if not parts else "stands more than once"))
    if order != list(BLOCKS) and sorted(order) == sorted(BLOCKS):
        errors.append(f"text: blocks are in the order {' '.join(order)}")
    return blocks, clean and open_name is None and order == list(BLOCKS)


def parse_payoff(text: str) -> tuple[Payoff | None, list[str]]:
    """(matrix, []) or (None, reasons) for the text of a payoff block."""
    if len(text) > MAX_PAYOFF_CHARS:
        return None, [f"payoff: {len(text)} characters, over {MAX_PAYOFF_CHARS}"]
    value = _read_literal(text.translate(_QUOTES).strip())
    if not isinstance(value, dict):
        return None, ["payoff: not a JSON object"]
    errors = [f"payoff.{key}: missing" for key in KEYS if key not in value]
    errors += [f"payoff.{str(key)[:20]}: not a cell" for key in value if key not in KEYS]
    for key in KEYS:
        errors += _cell_errors(key, value.get(key)) if key in value else []
    if errors:
        return None, errors
    return {key: {player: float(value[key][player]) for player in PLAYERS} for key in KEYS}, []


def _read_literal(text: str) -> Any:
    """JSON first, then a Python literal; None for anything else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _cell_errors(key: str, cell: Any) -> list[str]:
    if not isinstance(cell, dict) or set(cell) != set(PLAYERS):
        return [f"payoff.{key}: must hold LLM and user, nothing else"]
    return [
        f"payoff.{key}.{player}: {str(cell[player])[:20]!r} is not a finite number"
        for player in PLAYERS
        if isinstance(cell[player], bool)
        or not isinstance(cell[player], int | float)
        or abs(cell[player]) > 1e6
        or math.isnan(cell[player])
    ]


def payoff_array(chain: Chain) -> tuple[np.ndarray, bool]:
    """(matrix [2, 3, 2] float64 in (user move, action, player) order, True), or (zeros, False)."""
    matrix = np.zeros((len(USER_MOVES), len(ACTIONS), len(PLAYERS)))
    if chain.payoff is None:
        return matrix, False
    return to_array(chain.payoff), True


def to_array(payoff: Payoff) -> np.ndarray:
    """The matrix [2, 3, 2] float64 of a parsed payoff."""
    return np.array(
        [[[payoff[f"{m}_{a}"][p] for p in PLAYERS] for a in ACTIONS] for m in USER_MOVES], np.float64
    )


def chosen_action(analyze: str | None) -> str | None:
    """The action <analyze> settles on: the last of DA, CQ, AQ that it names (a key such as DQ_AQ too)."""
    named = _CHOICE.findall(analyze or "")
    return named[-1] if named else None
