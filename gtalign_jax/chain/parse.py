"""From a completion to its four blocks and payoff matrix: total, linear-time, and it says why not.

What was read is held to the format: the four blocks once each, in order, nothing else. A tag inside
another block makes both blocks void, because it could hide a second answer: neither is chosen.
"""

import re
from typing import NamedTuple

import numpy as np

from gtalign_jax.chain.matrix import (
    MAX_PAYOFF_CHARS,
    Payoff,
    Row,
    parse_payoff,
    parse_row,
    to_array,
    to_payoff,
)
from gtalign_jax.game.moves import ACTIONS, GTALIGN, USER_MOVES

# The matrix belongs to this room's front door too.
__all__ = [
    "BLOCKS",
    "MAX_CHARS",
    "MAX_PAYOFF_CHARS",
    "Chain",
    "Payoff",
    "chosen_action",
    "named_choice",
    "parse_chain",
    "parse_payoff",
    "payoff_array",
    "plain_chain",
    "to_array",
]

BLOCKS = ("thinking", "payoff", "analyze", "response")
MAX_CHARS = 200_000
MAX_ERRORS = 20

# White space, and what shows as little: control characters, soft hyphens, spaces of no width.
_BLANK = re.compile(r"[\s\x00-\x1f\x7f\u00ad\u200b-\u200f\u2060-\u2064\ufeff]*")
_TAG = re.compile(r"<(/?)(thinking|payoff|analyze|response)>")
_TAGS = tuple((f"<{name}>", f"</{name}>") for name in BLOCKS)
_CHOICE = re.compile(rf"\b((?:(?:{'|'.join(USER_MOVES)})_)?(?:{'|'.join(ACTIONS)}))\b")
_BEFORE = max(map(len, USER_MOVES)) + 1  # what may stand before an action in the name of a cell


class Chain(NamedTuple):
    """A parsed completion. A block that is absent, empty, repeated or nested is None, and `errors` says so.

    row: the valid matrix as twelve numbers in the array's order, or None. format_ok: the four blocks once
    each, none empty, in order, with only white space between and around them. errors: at most MAX_ERRORS
    reasons and a count of the others.
    """

    thinking: str | None
    payoff_text: str | None
    analyze: str | None
    response: str | None
    row: Row | None
    format_ok: bool
    errors: tuple[str, ...]

    @property
    def payoff(self) -> Payoff | None:
        """The valid matrix as {key: {"LLM": x, "user": y}}, or None."""
        return None if self.row is None else to_payoff(self.row)

    @property
    def reward_ok(self) -> bool:
        """Whether any reward is due: a response and a valid matrix (paper section 3)."""
        return self.response is not None and self.row is not None


def parse_chain(text: str, code_fences: bool = False) -> Chain:
    """Parse any string; never raises, and takes time linear in its length.

    code_fences: whether a matrix inside a ``` fence counts.
    """
    errors: list[str] = []
    if len(text) > MAX_CHARS:
        errors.append(f"text: {len(text)} characters, over {MAX_CHARS}")
        text = text[:MAX_CHARS]
    blocks = _canonical_blocks(text)
    format_ok = blocks is not None
    if blocks is None:
        blocks, format_ok = _split_blocks(text, errors)
    empty = [text is not None and _BLANK.fullmatch(text) is not None for text in blocks]
    errors += [f"{name}: empty" for name, nothing in zip(BLOCKS, empty, strict=True) if nothing]
    format_ok = format_ok and not any(empty)
    thinking, payoff_text, analyze, response = (
        None if nothing else text for text, nothing in zip(blocks, empty, strict=True)
    )
    row = None
    if payoff_text is not None:
        row, payoff_errors = parse_row(payoff_text, code_fences)
        errors += payoff_errors
    if len(errors) > MAX_ERRORS:
        errors[MAX_ERRORS:] = [f"text: {len(errors) - MAX_ERRORS} more errors"]
    return Chain(thinking, payoff_text, analyze, response, row, format_ok, tuple(errors))


def plain_chain(text: str) -> Chain:
    """A completion without the protocol: all of it is the response, and no other block is expected."""
    return Chain(None, None, None, None if _BLANK.fullmatch(text) else text.strip(), None, False, ())


Blocks = tuple[str | None, str | None, str | None, str | None]


def _canonical_blocks(text: str) -> Blocks | None:
    """The blocks of a well-formed completion; None for any other, whose faults `_split_blocks` finds."""
    blocks, at = [], 0
    for opening, closing in _TAGS:
        start = text.find(opening, at)
        end = text.find(closing, start)
        if start < 0 or end < 0 or (start > at and not text[at:start].isspace()):
            return None
        blocks.append(text[start + len(opening) : end].strip())
        at = end + len(closing)
    if at < len(text) and not text[at:].isspace():
        return None
    # Eight tags were found; with no other "<" there is no ninth.
    others = text.count("<") > 2 * len(_TAGS) and len(_TAG.findall(text)) > 2 * len(_TAGS)
    thinking, payoff, analyze, response = blocks
    return None if others else (thinking, payoff, analyze, response)


def _split_blocks(text: str, errors: list[str]) -> tuple[Blocks, bool]:
    """The inside of each block that is whole and stands once, and whether all is in its place."""
    found: dict[str, list[str]] = {name: [] for name in BLOCKS}
    void: set[str] = set()
    open_name, open_end, outside_from, order = None, 0, 0, []
    clean = True
    for tag in _TAG.finditer(text):
        closing, name = tag.group(1) == "/", tag.group(2)
        if open_name is None and not closing:
            clean = clean and not text[outside_from : tag.start()].strip()
            open_name, open_end = name, tag.end()
        elif open_name == name and closing:
            found[name].append(text[open_end : tag.start()])
            order.append(name)
            open_name, outside_from = None, tag.end()
        elif open_name is None:
            errors.append(f"{name}: closed at character {tag.start()} without being opened")
            clean, outside_from = False, tag.end()
        else:
            errors.append(f"{open_name}: {tag.group()} inside it at character {tag.start()}")
            void |= {open_name, name}
            clean, open_name, outside_from = False, None, tag.end()
    if open_name is not None:
        errors.append(f"{open_name}: never closed")
    if not clean or (open_name is None and text[outside_from:].strip()):
        clean = False
        errors.append("text: something stands outside the four blocks")
    if order != list(BLOCKS) and sorted(order) == sorted(BLOCKS):
        errors.append(f"text: blocks are in the order {' '.join(order)}")
    thinking, payoff, analyze, response = (_only(name, found[name], name in void, errors) for name in BLOCKS)
    blocks = (thinking, payoff, analyze, response)
    ordered = clean and open_name is None and order == list(BLOCKS)
    return blocks, ordered and None not in blocks


def _only(name: str, parts: list[str], void: bool, errors: list[str]) -> str | None:
    """The one text of a block, or None and the reason."""
    if len(parts) == 1 and not void:
        return parts[0].strip()
    why = "void, nested with another block" if void else "stands more than once" if parts else "missing"
    errors.append(f"{name}: {why}")
    return None


def payoff_array(chain: Chain) -> tuple[np.ndarray, bool]:
    """(matrix [2, 3, 2] float64 in (user move, action, player) order, True), or (zeros, False)."""
    if chain.row is None:
        return np.zeros(GTALIGN.shape), False
    return np.array(chain.row, np.float64).reshape(GTALIGN.shape), True


def named_choice(analyze: str | None) -> str | None:
    """What <analyze> settles on: the last action (`AQ`) or cell (`DQ_AQ`) that it names, as written."""
    text = analyze or ""
    last = max(map(text.rfind, ACTIONS))
    # Nearly always the last letters that look like an action are one; "AQUA" sends us through the text.
    named = _CHOICE.findall(text, max(last - _BEFORE, 0)) or _CHOICE.findall(text)
    return named[-1] if named else None


def chosen_action(analyze: str | None) -> str | None:
    """The action of `named_choice`: DA, CQ, AQ or None."""
    choice = named_choice(analyze)
    return GTALIGN.split(choice)[1] if choice else None
