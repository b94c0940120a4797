"""Steering at inference time: edit the payoff matrix a model wrote and let it go on from there.

    <thinking> ... <payoff> M </payoff>      generated, then stopped
                   <payoff> M'</payoff>      M' = edit(M), the only text that is tokenised again
                           <analyze> ...     the same sequence goes on, on the cache it already has

The unedited sequence is continued too, from the same tokens and with the same random numbers, so the
two texts differ only by what the edit caused (arXiv 2510.08872, inference-time steering).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from gtalign_jax.chain.parse import chosen_action, parse_chain, parse_payoff, to_array
from gtalign_jax.chain.prompt import payoff_json
from gtalign_jax.errors import UserError
from gtalign_jax.mesh import processes
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generate
from gtalign_jax.rollout.decode_state import DecodeState, Forced
from gtalign_jax.rollout.engine import Engine, Messages
from gtalign_jax.rollout.grammar import Constraint
from gtalign_jax.rollout.request import Ending, Request
from gtalign_jax.types import Array, PyTree

OPEN, CLOSE = "<payoff>", "</payoff>"
Edit = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Branch:
    """One way the sequence went: its matrix [U, A, 2], the action <analyze> names, its text and tokens."""

    payoff: np.ndarray
    action: str | None
    text: str
    token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Steered:
    """The unedited and the edited branch.

    prefix: tokens up to </payoff> with the edited matrix; `edited.token_ids` begins with them, token
    for token. kept: how many of them are the model's own, on the cache of the first pass.
    """

    original: Branch
    edited: Branch
    prefix: tuple[int, ...]
    kept: int


@dataclasses.dataclass(frozen=True)
class Splice:
    """A cut sequence with its matrix replaced: see `Steered` for prefix and kept."""

    prefix: tuple[int, ...]
    kept: int


def steer(
    engine: Engine,
    params: PyTree,
    prompt: str | Messages,
    edit: Edit,
    key: Array,
    *,
    max_new_tokens: int,
    stop: Ending | None = None,
    constraint: Constraint | None = None,
) -> Steered:
    """Generate to </payoff>, edit the matrix [U, A, 2], and continue both the old and the new.

    stop: `stop_ending(engine)`, made once by a caller who steers many prompts. constraint: hold the whole
    sequence to the grammar, so that there always is a usable matrix. Raises UserError when
    the model writes no usable matrix, or when the edited one leaves no room.
    """
    engine = dataclasses.replace(engine, buckets=dataclasses.replace(engine.buckets, batch=(1,)))
    batch = engine_lib.prompt_batch(engine, [engine_lib.encode(engine, prompt)])
    stop = stop_ending(engine) if stop is None else stop
    request = Request(batch, key, 1, max_new_tokens, ending=stop, constraint=constraint)
    state = generate.begin(engine, params, request)
    written = _tokens(state)
    payoff = read_payoff(engine_lib.decode_tokens(engine, written))
    edited = np.asarray(edit(payoff), np.float64)
    splice = splice_payoff(engine, written, payoff_json(edited))
    if len(splice.prefix) >= max_new_tokens:
        raise UserError(
            f"max_new_tokens={max_new_tokens}: the edited matrix ends at token {len(splice.prefix)}; raise it"
        )
    own, to_the_end = Splice(tuple(written), len(written)), request.replace(ending=None)
    state = _continue(engine, params, state, own, to_the_end)
    original = _branch(engine, payoff, _tokens(state))
    state = _continue(engine, params, state, splice, to_the_end)
    return Steered(original, _branch(engine, edited, _tokens(state)), splice.prefix, splice.kept)


def stop_ending(engine: Engine) -> Ending:
    """What ends the first pass: the closing tag of the matrix."""
    return engine_lib.make_ending(engine, [CLOSE])


def read_payoff(text: str) -> np.ndarray:
    """The matrix float64 [U, A, 2] of a text that ends with its <payoff> block."""
    inside, closed, _ = text.partition(CLOSE)
    _, opened, block = inside.rpartition(OPEN)
    payoff, errors = parse_payoff(block) if closed and opened else (None, ["no payoff block"])
    if payoff is None:
        tail = " ".join(inside.split())[-120:]
        raise UserError(f"the model wrote no usable matrix to edit ({errors[0]}); its text ends {tail!r}")
    return to_array(payoff)


def splice_payoff(engine: Engine, token_ids: Sequence[int], matrix: str) -> Splice:
    """Replace the text inside the <payoff> block of a sequence that ends with </payoff>.

    Only the tokens that touch the matrix are made again; those before it are kept as they are.
    """
    text = engine_lib.decode_tokens(engine, token_ids)
    close = text.index(CLOSE)
    inside = text.rindex(OPEN, 0, close) + len(OPEN)
    block = text[inside:close]
    first = inside + len(block) - len(block.lstrip())
    after = inside + len(block.rstrip())
    kept = len(token_ids)
    while not text[:first].startswith(head := engine_lib.decode_tokens(engine, token_ids[:kept])):
        kept -= 1
    if kept == 0:
        raise UserError("the matrix begins inside the first token, so there is no sequence to resume")
    segment = text[len(head) : first] + matrix + text[after:]
    made = engine.tokenizer(segment, add_special_tokens=False)["input_ids"]
    return Splice((*map(int, token_ids[:kept]), *made), kept)


def _continue(
    engine: Engine, params: PyTree, state: DecodeState, splice: Splice, request: Request
) -> DecodeState:
    """Go on after the splice's prefix, on the cache of its kept tokens."""
    shape = state.completions.tokens.shape
    tokens = np.zeros(shape, np.int32)
    tokens[..., : len(splice.prefix)] = splice.prefix
    forced = Forced(tokens, np.full(shape[:2], len(splice.prefix), np.int32))
    return generate.resume(engine, params, state, forced, splice.kept, request)


def _tokens(state: DecodeState) -> list[int]:
    return engine_lib.completion_ids(processes.fetch(state.completions))[0].tolist()


def _branch(engine: Engine, payoff: np.ndarray, token_ids: list[int]) -> Branch:
    text = engine_lib.decode_tokens(engine, token_ids)
    return Branch(payoff, chosen_action(parse_chain(text).analyze), text, tuple(token_ids))
