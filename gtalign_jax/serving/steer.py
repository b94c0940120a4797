"""Steering at inference time: edit the payoff matrix a model wrote and let it go on from there.

    <thinking> ... <payoff> M </payoff>      generated, then stopped
                   <payoff> M'</payoff>      M' = edit(M), the only text that is tokenised again
                           <analyze> ...     the same sequence goes on, on the cache it already has

The unedited sequence is continued too, from the same tokens and with the same random numbers, so the
texts differ only by what the edit caused (arXiv 2510.08872, inference-time steering). Many prompts
go together: what all rows keep of the first pass is not computed again for any edit.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from gtalign_jax.chain.parse import chosen_action, parse_chain
from gtalign_jax.errors import UserError
from gtalign_jax.mesh import processes
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generate
from gtalign_jax.rollout.decode_state import DecodeState, Forced
from gtalign_jax.rollout.engine import Engine, Prompt
from gtalign_jax.rollout.grammar import Constraint
from gtalign_jax.rollout.request import Ending, Request
from gtalign_jax.serving.splice import (
    AGAIN,
    ANALYZE,
    CLOSE,
    ERROR,
    GRAMMAR,
    MODEL,
    TRIES,
    UNUSABLE,
    Splice,
    read_payoff,
    splice_payoff,
)
from gtalign_jax.types import Array, PyTree

Edit = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Options:
    """How to steer.

    max_new_tokens: of a whole sequence, both passes together. analyze: who writes the edited branch's
    <analyze>: the model, or the solver, whose text is forced so that the choice follows the matrix.
    unusable: what becomes of a prompt whose matrix cannot be read: an error, another try with other random
    numbers, one under the grammar (`constraint`), or a sequence without an edit that says why. tries: first
    passes of a prompt, with `again` and `grammar`; after the last failure it stays unsteered.
    """

    max_new_tokens: int
    analyze: str = MODEL
    unusable: str = ERROR
    tries: int = TRIES

    def __post_init__(self) -> None:
        for field, known in (("analyze", ANALYZE), ("unusable", UNUSABLE)):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r}: must be one of {', '.join(known)}")
        if self.max_new_tokens < 1 or self.tries < 1:
            raise ValueError("max_new_tokens and tries must be at least 1")


@dataclasses.dataclass(frozen=True)
class Branch:
    """One way a sequence went: its matrix [U, A, 2], the action <analyze> names, its text and tokens.

    payoff: None where the model wrote none that can be read. splice: what it was continued from. seconds: of
    the pass that continued it, the same for all prompts of a batch.
    """

    payoff: np.ndarray | None
    action: str | None
    text: str
    token_ids: tuple[int, ...]
    splice: Splice
    seconds: float


@dataclasses.dataclass(frozen=True)
class Steered:
    """A prompt's sequence as the model wrote it, and a branch of each edit: none, and why, in `failure`."""

    original: Branch
    edited: tuple[Branch, ...] = ()
    failure: str | None = None


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A first pass: its tokens, the matrix or why there is none, and whether the sequence ended with it."""

    token_ids: tuple[int, ...]
    payoff: np.ndarray | None
    failure: str | None
    over: bool


def steer(
    engine: Engine,
    params: PyTree,
    prompts: Sequence[Prompt],
    edits: Sequence[Edit],
    key: Array,
    options: Options,
    *,
    stop: Ending | None = None,
    constraint: Constraint | None = None,
) -> list[Steered]:
    """Generate each prompt to </payoff>, edit its matrix [U, A, 2] in every way, and continue old and new.

    stop: `stop_ending(engine)`, made once by a caller of many batches. constraint: hold the whole sequence to
    the grammar; with unusable="grammar" those of second tries alone. Raises UserError, with
    unusable="error", when the model writes no usable matrix or an edited one leaves no room.
    """
    if options.unusable == GRAMMAR and constraint is None:
        raise ValueError("unusable='grammar' needs the constraint")
    request = Request(
        engine_lib.prompt_batch(engine, [engine_lib.encode(engine, prompt) for prompt in prompts]),
        key,
        1,
        options.max_new_tokens,
        ending=stop_ending(engine) if stop is None else stop,
        constraint=None if options.unusable == GRAMMAR else constraint,
    )
    found = _steer_once(engine, params, request, edits, options)
    for attempt in range(1, options.tries if options.unusable in (AGAIN, GRAMMAR) else 1):
        failed = np.array([i for i, row in enumerate(found) if row.failure], np.int32)
        if not len(failed):
            break
        again = request.replace(
            prompts=jax.tree.map(lambda x, rows=failed: x[rows], request.prompts),
            key=jax.random.fold_in(key, attempt),
            constraint=constraint,
        )
        for i, row in zip(failed, _steer_once(engine, params, again, edits, options), strict=True):
            found[i] = row
    return found


def stop_ending(engine: Engine) -> Ending:
    """What ends the first pass: the closing tag of the matrix."""
    return engine_lib.make_ending(engine, [CLOSE])


def _steer_once(
    engine: Engine, params: PyTree, request: Request, edits: Sequence[Edit], options: Options
) -> list[Steered]:
    state = generate.begin(engine, params, request)
    lengths = np.asarray(processes.fetch(state.prompts.length))
    cuts = [_read_cut(engine, ids) for ids in _tokens(state)[: len(request.prompts.length)]]
    passes = [[(cut.payoff, Splice(cut.token_ids, len(cut.token_ids))) for cut in cuts]]
    failures = [cut.failure for cut in cuts]
    for edit in edits:
        rows = [_edited(engine, cut, edit, options) for cut in cuts]
        for i, (_, splice) in enumerate(rows):
            if failures[i] is None and len(splice.prefix) >= options.max_new_tokens:
                failures[i], rows[i] = _no_room(splice, options), passes[0][i]
        passes.append(rows)
    if options.unusable == ERROR and any(failures):
        raise UserError(next(failure for failure in failures if failure))
    over = [cut.over for cut in cuts]
    branches, request = [], request.replace(ending=None)
    for rows in passes:
        alive = np.where(np.pad(over, (0, len(lengths) - len(over))), 0, lengths)
        state, found = _follow(engine, params, state, rows, alive, request)
        branches.append(found)
        over = [why is not None for why in failures]  # the edits' passes leave out what has no edit
    return [
        Steered(original, () if why else edited, why)
        for original, edited, why in zip(branches[0], _by_row(branches[1:], len(cuts)), failures, strict=True)
    ]


def _by_row(passes: Sequence[Sequence[Branch]], rows: int) -> list[tuple[Branch, ...]]:
    return list(zip(*passes, strict=True)) or [()] * rows


def _read_cut(engine: Engine, token_ids: Sequence[int]) -> _Cut:
    text = engine_lib.decode_tokens(engine, token_ids)
    try:
        payoff, failure = read_payoff(text), None
    except UserError as error:
        payoff, failure = None, str(error)
    return _Cut(tuple(token_ids), payoff, failure, over=CLOSE not in text)


def _edited(engine: Engine, cut: _Cut, edit: Edit, options: Options) -> tuple[np.ndarray | None, Splice]:
    """The edited matrix and what is continued with it; a sequence without a matrix as it is."""
    if cut.payoff is None:
        return None, Splice(cut.token_ids, len(cut.token_ids))
    payoff = np.asarray(edit(cut.payoff), np.float64)
    return payoff, splice_payoff(engine, cut.token_ids, payoff, options.analyze)


def _no_room(splice: Splice, options: Options) -> str:
    end = len(splice.prefix)
    return f"max_new_tokens={options.max_new_tokens}: the edited matrix ends at token {end}; raise it"


def _follow(
    engine: Engine,
    params: PyTree,
    state: DecodeState,
    rows: Sequence[tuple[np.ndarray | None, Splice]],
    lengths: np.ndarray,
    request: Request,
) -> tuple[DecodeState, list[Branch]]:
    """Go on after each row's splice, on the cache of the tokens that all rows keep.

    lengths [P]: of the prompts, 0 for rows that are not continued: they cost no steps, as padding does not.
    """
    began, splices = time.monotonic(), [splice for _, splice in rows]
    shape = state.completions.tokens.shape
    tokens, count = np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32)
    for row, splice in enumerate(splices):
        tokens[row, :, : len(splice.prefix)] = splice.prefix
        count[row] = len(splice.prefix)
    keep = min((s.kept for s, length in zip(splices, lengths, strict=False) if length), default=1)
    placed = jax.device_put(lengths, state.prompts.length.sharding)
    state = state.replace(prompts=state.prompts.replace(length=placed))
    state = generate.resume(engine, params, state, Forced(tokens, count), keep, request)
    written, seconds = _tokens(state), time.monotonic() - began
    branches = []
    for (payoff, splice), ids, length in zip(rows, written, lengths, strict=False):
        found = tuple(ids) if length else splice.prefix
        text = engine_lib.decode_tokens(engine, found)
        action = chosen_action(parse_chain(text).analyze)
        branches.append(Branch(payoff, action, text, found, splice, seconds))
    return state, branches


def _tokens(state: DecodeState) -> list[list[int]]:
    return [ids.tolist() for ids in engine_lib.completion_ids(processes.fetch(state.completions))]
