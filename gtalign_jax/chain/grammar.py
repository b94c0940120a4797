"""The protocol as a finite automaton over the bytes of its UTF-8 text.

    <thinking> free </thinking>
    <payoff>
    {"DQ_AQ": {"LLM": x, "user": y}, ... six cells, as `chain.prompt.payoff_json` writes them}
    </payoff>
    <analyze> free </analyze>
    <response> free </response>

with one newline where the lines above break. Free text is any valid UTF-8 in which no tag of the
protocol stands but the block's own closing one, so no second block can hide in it, and in which something is
said: one visible character at least (of Unicode's ranges that hold white space none counts). A payoff is a
number from -5.0 to 5.0 with one decimal, and never minus zero. What the automaton accepts, `parse_chain`
finds well-formed, with its matrix; it knows no tokenizer and no model (`rollout.grammar` lifts it to tokens).
"""

from typing import NamedTuple

import numpy as np

from gtalign_jax.chain.parse import BLOCKS
from gtalign_jax.game.moves import KEYS, PLAYERS

BYTES = 256
_TAGS = tuple(f"<{slash}{name}>".encode() for name in BLOCKS for slash in ("", "/"))

# Characters of several bytes: (range of the first byte, ranges of those that follow), RFC 3629 section 4.
_ANY = range(0x80, 0xC0)
_LEADS = (
    (range(0xC2, 0xE0), (_ANY,)),
    (range(0xE0, 0xE1), (range(0xA0, 0xC0), _ANY)),
    (range(0xE1, 0xED), (_ANY, _ANY)),
    (range(0xED, 0xEE), (range(0x80, 0xA0), _ANY)),
    (range(0xEE, 0xF0), (_ANY, _ANY)),
    (range(0xF0, 0xF1), (range(0x90, 0xC0), _ANY, _ANY)),
    (range(0xF1, 0xF4), (_ANY, _ANY, _ANY)),
    (range(0xF4, 0xF5), (range(0x80, 0x90), _ANY, _ANY)),
)
# Ranges that hold white space and signs of no width, by the first bytes of their characters.
_BLANK_RANGES = {0xC2: (), 0xE1: (0x9A,), 0xE2: (0x80, 0x81), 0xE3: (0x80,), 0xEF: (0xBB,)}
_VISIBLE = range(0x21, 0x7F)


class Grammar(NamedTuple):
    """A deterministic automaton over bytes.

    step [states, 256] int32: the state after a byte. start, accept, dead: state numbers; nothing leaves
    dead, and no byte leads from accept to another state than dead. block [states] int32: the index in
    BLOCKS of the block being written (the text between two blocks belongs to the later one).
    """

    step: np.ndarray
    block: np.ndarray
    start: int
    accept: int
    dead: int


def chain_grammar() -> Grammar:
    """The automaton of the four blocks: about 850 states."""
    build = _Builder()
    start = at = build.state(0)
    for block, name in enumerate(BLOCKS):
        opening, closing = f"{'' if block == 0 else chr(10)}<{name}>", f"</{name}>"
        build.current = block
        at = build.literal(at, opening)
        if name == "payoff":
            at = build.literal(at, "\n")
            at = _matrix(build, at)
            at = build.literal(at, "\n" + closing)
        else:
            at = _free_text(build, at, closing.encode())
    accept, dead = at, build.state()
    step = np.full((dead + 1, BYTES), dead, np.int32)
    for state, byte, target in build.edges:
        step[state, byte] = dead if target is None else target
    return Grammar(step, np.asarray(build.blocks, np.int32), start, accept, dead)


def run(grammar: Grammar, text: bytes, state: int | None = None) -> int:
    """The state after `text`, from `state` (default: the start)."""
    state = grammar.start if state is None else state
    for byte in text:
        state = int(grammar.step[state, byte])
    return state


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether the whole text is one chain in canonical form. Text that has no UTF-8 form is not."""
    try:
        return run(grammar, text.encode()) == grammar.accept
    except UnicodeEncodeError:
        return False


class _Builder:
    """States in the order they are made and the edges between them; a later edge replaces an earlier."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.edges: list[tuple[int, int, int | None]] = []
        self.current = 0

    def state(self, block: int | None = None) -> int:
        self.blocks.append(self.current if block is None else block)
        return len(self.blocks) - 1

    def edge(self, at: int, byte: int, target: int | None) -> None:
        self.edges.append((at, byte, target))

    def literal(self, at: int, text: str) -> int:
        for byte in text.encode():
            following = self.state()
            self.edge(at, byte, following)
            at = following
        return at


def _matrix(build: _Builder, at: int) -> int:
    """The matrix as `payoff_json` writes it; returns the state after its last brace."""
    first, second = PLAYERS
    for i, key in enumerate(KEYS):
        at = build.literal(at, f'{"{" if i == 0 else "}, "}"{key}": {{"{first}": ')
        at = _number(build, at)
        at = _number(build, build.literal(at, f', "{second}": '))
    return build.literal(at, "}}")


def _number(build: _Builder, at: int) -> int:
    """-5.0 to 5.0 with one decimal, without -0.0."""
    end, minus, small, zero, five = (build.state() for _ in range(5))
    points = [build.state() for _ in range(3)]
    build.edge(at, ord("-"), minus)
    for state in (at, minus):
        for digit in b"01234":
            build.edge(state, digit, small)
        build.edge(state, ord("5"), five)
    build.edge(minus, ord("0"), zero)
    for state, point, last in zip(
        (small, zero, five), points, (b"0123456789", b"123456789", b"0"), strict=True
    ):
        build.edge(state, ord("."), point)
        for digit in last:
            build.edge(point, digit, end)
    return end


def _free_text(build: _Builder, at: int, closing: bytes) -> int:
    """Text up to the closing tag, and no other tag; returns the state after the closing tag.

    The states are the proper prefixes of the tags. Each tag has its only "<" in front, so a prefix that
    does not go on falls back to nothing, or to "<". They stand twice: while the text is blank, and after.
    """
    prefixes = sorted({tag[:n] for tag in _TAGS for n in range(1, len(tag))}, key=lambda p: (len(p), p))
    blank = {b"": at, **{prefix: build.state() for prefix in prefixes}}
    number = {prefix: build.state() for prefix in (b"", *prefixes)}
    text = number[b""]
    continued = [_continuation(build, text, following) for _, following in _LEADS]
    for state in (*blank.values(), *number.values()):
        for byte in range(0x80):
            build.edge(state, byte, text)
        build.edge(state, ord("<"), number[b"<"])
        for (lead, _), inside in zip(_LEADS, continued, strict=True):
            for byte in lead:
                build.edge(state, byte, inside)
    _stay_blank(build, at, text)
    for states in (blank, number):
        for prefix in prefixes:
            build.edge(states[prefix[:-1]], prefix[-1], states[prefix])
        for tag in _TAGS:
            build.edge(states[tag[:-1]], tag[-1], None)
    end = build.state(min(build.current + 1, len(BLOCKS) - 1))
    build.edge(number[closing[:-1]], closing[-1], end)
    return end


def _stay_blank(build: _Builder, blank: int, text: int) -> None:
    """Characters after which a blank text is still blank: they lead from `blank` to itself, not to `text`."""
    for byte in set(range(0x80)) - set(_VISIBLE):
        build.edge(blank, byte, blank)
    for lead, seconds in _BLANK_RANGES.items():
        (following,) = (ranges for leads, ranges in _LEADS if lead in leads)
        if not seconds:
            build.edge(blank, lead, _continuation(build, blank, following))
            continue
        first, last = build.state(), _continuation(build, blank, following[1:])
        visible = _continuation(build, text, following[1:])
        build.edge(blank, lead, first)
        for byte in following[0]:
            build.edge(first, byte, last if byte in seconds else visible)


def _continuation(build: _Builder, end: int, following: tuple[range, ...]) -> int:
    """The state in which the bytes `following` lead to `end`."""
    at = first = build.state()
    for i, allowed in enumerate(following):
        target = end if i == len(following) - 1 else build.state()
        for byte in allowed:
            build.edge(at, byte, target)
        at = target
    return first
