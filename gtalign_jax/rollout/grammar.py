"""Decoding under the chain's grammar: a byte automaton lifted to tokens, with a budget.

    next[s, v]    state after token v; what the grammar forbids leads to a state of its own, `off`
    D[s]          fewest tokens from s to the end of the chain, end token included
    waste[s, v]   1 + D[next[s, v]] - D[s] >= 0: by how much token v lengthens the shortest way
    allowed       waste[s, v] <= left - D[s]

`left` is what a row may still write. A row therefore always reaches the end: while there is room any
text is open to it, and when the last room is spent only the shortest way is. Tokens with equal columns
of `next` form a class, and the tables hold one column a class, so 150 000 tokens need a few megabytes.
Logits of forbidden tokens become -inf before sampling: the log-probability of a token is renormalised
over the allowed ones. Where the room is too small to end at all, only the grammar holds; after a forced
token that breaks the grammar the row is free.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gtalign_jax.chain.grammar import Grammar
from gtalign_jax.chain.parse import BLOCKS
from gtalign_jax.errors import UserError
from gtalign_jax.rollout.sampling import FAR_BELOW
from gtalign_jax.types import Array, Completions

UNLIMITED = 2**30
_FORBIDDEN = 255
_FAR = np.int32(2**29)


@dataclasses.dataclass(frozen=True)
class BlockLimits:
    """How many tokens more than the shortest way to the end a row may write from a block's beginning on.

    The limit of the next block replaces it, so each block has room of its own. None: the whole budget.
    Without limits a block that does not end by itself leaves the later ones their shortest form; limits
    that add up to the budget less `shortest(constraint)` prevent that.
    """

    thinking: int | None = None
    payoff: int | None = None
    analyze: int | None = None
    response: int | None = None

    def __post_init__(self) -> None:
        for name in BLOCKS:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise ValueError(f"{name}={value}: give 0 or more tokens, or None")


def read_limits(text: str) -> BlockLimits:
    """Limits from a text such as `thinking=60,response=200`; "" is none. UserError names what is wrong."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    for name, _, value in pairs:
        if name not in BLOCKS or not value.isdecimal():
            raise UserError(f"limits {text!r}: write BLOCK=TOKENS,... with blocks {', '.join(BLOCKS)}")
    return BlockLimits(**{name: int(value) for name, _, value in pairs})


class Constraint(NamedTuple):
    """The tables of the lifted automaton: S states, C classes, V tokens.

    classes [V] int32; step [S, C] int32 next state; waste [S, C] uint8, 255 where forbidden;
    distance [S] int32, D above; block [S] int32, index in BLOCKS, one more for `off`;
    limit [blocks + 1] int32; budget [] int32, completion tokens in all. State 0 is the start, the last
    two are `off` and the end of a chain.
    """

    classes: Array
    step: Array
    waste: Array
    distance: Array
    block: Array
    limit: Array
    budget: Array


class GrammarState(flax.struct.PyTreeNode):
    """Where each row is: state and left (tokens it may still write), int32 of any shape."""

    state: Array
    left: Array


def compile_constraint(
    grammar: Grammar,
    token_bytes: Sequence[bytes | None],
    eos_ids: Sequence[int],
    limits: BlockLimits | None = None,
    budget: int = UNLIMITED,
) -> Constraint:
    """Lift the grammar to tokens; NumPy arrays, made once per tokenizer.

    token_bytes: bytes of every token id, None where it is never text. eos_ids end a whole chain, and
    nothing else. UserError when these tokens cannot write a chain.
    """
    columns, classes = _classes(grammar, token_bytes)
    classes[[i for i in eos_ids if 0 <= i < len(classes)]] = len(columns)
    off, end = grammar.dead, grammar.dead + 1  # the automaton's dead state is where a row is free
    step = np.full((end + 1, len(columns) + 1), off, np.int32)
    step[:end, :-1] = columns.T
    step[[grammar.accept, end], -1] = end
    distance = _distances(step, end)
    if distance[grammar.start] >= _FAR:
        raise UserError(
            "tokenizer: its tokens cannot write the chain's tags and matrix; decode without the constraint"
        )
    waste = 1 + distance[step] - distance[:, None]
    forbidden = (step == off) | (distance[step] >= _FAR) | (waste >= _FORBIDDEN)
    forbidden[off] = False
    waste[off] = distance[off] = 0
    limits = limits or BlockLimits()
    room = [UNLIMITED if (value := getattr(limits, name)) is None else value for name in BLOCKS]
    return Constraint(
        classes=classes,
        step=np.where(forbidden, off, step).astype(np.int32),
        waste=np.where(forbidden, _FORBIDDEN, waste).astype(np.uint8),
        distance=distance,
        block=np.array([*grammar.block[:-1], len(BLOCKS), len(BLOCKS) - 1], np.int32),
        limit=np.array([*room, UNLIMITED], np.int32),
        budget=np.array(budget, np.int32),
    )


def _classes(grammar: Grammar, token_bytes: Sequence[bytes | None]) -> tuple[np.ndarray, np.ndarray]:
    """(columns [C, states] int16, class of each token [V] int32).

    A text acts on the states as a function; those of longer texts are made from those of shorter ones,
    each once, so the work is one look-up a byte.
    """
    kinds, inverse = np.unique(grammar.step.astype(np.int16), axis=1, return_inverse=True)
    kind = inverse.reshape(-1).tolist()
    dead = np.full(len(grammar.step), grammar.dead, np.int16)
    functions = [np.arange(len(dead), dtype=np.int16), dead]
    number = {function.tobytes(): i for i, function in enumerate(functions)}
    after: dict[tuple[int, int], int] = {}
    classes = np.empty(len(token_bytes), np.int32)
    for i, text in enumerate(token_bytes):
        at = 0 if text else 1  # a token without text is never chosen: it would lead nowhere
        for byte in text or b"":
            key = (at, kind[byte])
            if key not in after:
                function = kinds[functions[at], kind[byte]]
                after[key] = number.setdefault(function.tobytes(), len(functions))
                if after[key] == len(functions):
                    functions.append(function)
            at = after[key]
        classes[i] = at
    used, renumbered = np.unique(classes, return_inverse=True)
    return np.stack([functions[i] for i in used]), renumbered.reshape(-1).astype(np.int32)


def _distances(step: np.ndarray, end: int) -> np.ndarray:
    """Fewest tokens [S] int32 from each state to `end`; _FAR or more where there is no way."""
    distance = np.full(len(step), _FAR, np.int32)
    distance[end] = 0
    while True:
        shorter = np.minimum(distance, 1 + distance[step].min(axis=1))
        if (shorter == distance).all():
            return distance
        distance = shorter


def shortest(constraint: Constraint) -> int:
    """The fewest tokens of a whole chain, end token included."""
    return int(jax.device_get(constraint.distance)[0])


def free(constraint: Constraint) -> int:
    """The state in which a row is held to nothing."""
    return len(constraint.step) - 2


def reached(constraint: Constraint, tokens: Iterable[int]) -> int:
    """The state after these tokens from the start, on the host; `free` where they break the grammar."""
    step, classes, state = np.asarray(constraint.step), np.asarray(constraint.classes), 0
    for token in tokens:
        state = int(step[state, classes[token]])
    return state


def start_state(constraint: Constraint, shape: Sequence[int]) -> GrammarState:
    """Rows of the given shape before their first token."""
    return state_at(constraint, jnp.zeros(tuple(shape), jnp.int32))


def state_at(constraint: Constraint, state: Array) -> GrammarState:
    """Rows whose next token is held to `state` [...], with the whole budget, [] or [...], before them."""
    return GrammarState(state, _room(constraint, state, jnp.asarray(constraint.budget)))


def masked_logits(constraint: Constraint, at: GrammarState, logits: Array, fill: float = -jnp.inf) -> Array:
    """logits [..., V] with `fill` where a token is not allowed; at: states of shape [...].

    At least one token stays allowed in every state.
    """
    slack = at.left - constraint.distance[at.state]
    # Too little room to end: the grammar alone decides.
    slack = jnp.where(slack < 0, _FORBIDDEN - 1, jnp.minimum(slack, _FORBIDDEN - 1)).astype(jnp.uint8)
    allowed = constraint.waste[at.state] <= slack[..., None]
    allowed = jnp.take(allowed, constraint.classes, axis=-1, mode="clip")
    return jnp.where(allowed, logits, fill)


def advanced(
    constraint: Constraint, at: GrammarState, token: Array, t: Array, live: Array | bool = True
) -> GrammarState:
    """The states after token number t [...] int32; rows that are not live [...] stay where they are."""
    state = constraint.step[at.state, constraint.classes[token]]
    total = constraint.budget - (t + 1)
    entered = constraint.block[state] != constraint.block[at.state]
    left = jnp.where(entered, _room(constraint, state, total), at.left - 1)
    return GrammarState(jnp.where(live, state, at.state), jnp.where(live, left, at.left))


def replay(constraint: Constraint, tokens: Array, length: Array) -> tuple[GrammarState, GrammarState]:
    """(states [...] after the first length [...] tokens of tokens [..., N], states [..., N] before each).

    With the second, `masked_logits` of a whole-row forward pass gives the distributions the tokens were
    drawn from.
    """

    def step(at: GrammarState, scanned: tuple[Array, Array]) -> tuple[GrammarState, GrammarState]:
        token, t = scanned
        return advanced(constraint, at, token, t, t < length), at

    count = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
    begin = start_state(constraint, tokens.shape[:-1])
    last, before = jax.lax.scan(step, begin, (jnp.moveaxis(tokens, -1, 0), count))
    return last, jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), before)


def _room(constraint: Constraint, state: Array, total: Array) -> Array:
    """What a row that enters a block may write: its limit beyond the shortest way, within the budget."""
    limit = constraint.limit[constraint.block[state]]
    return jnp.minimum(total, constraint.distance[state] + limit)


def action_states(constraint: Constraint, completions: Completions) -> GrammarState:
    """Where each action was chosen: states of shape [P, G, N], to limit the trainer's logits.

    Columns that are no action (padding, forced tokens) are free, so that nothing there is -inf. The
    constraint's budget must be the one of the completions.
    """
    tables = jax.tree.map(jnp.asarray, constraint)
    _, before = replay(tables, completions.tokens, completions.length)
    return before.replace(state=jnp.where(completions.action_mask, before.state, free(constraint)))


def limited_logits(constraint: Constraint, at: GrammarState, logits: Array) -> Array:
    """`masked_logits` for a loss: a number far below any logit in place of -inf, whose product with a
    probability of zero is zero and not undefined."""
    return masked_logits(jax.tree.map(jnp.asarray, constraint), at, logits, FAR_BELOW)
