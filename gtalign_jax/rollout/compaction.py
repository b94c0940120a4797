"""Generation that stops paying for rows that are done.

A batch runs until its longest row ends. Here the loop pauses when at most half of the rows are still
live; those are gathered into a batch of half the size and go on, then a quarter of them, and so on; the
last row goes on alone. The sizes are fixed, so a few programs serve every pattern of lengths; what a
row draws does not change.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from gtalign_jax.mesh import processes
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.rollout import placing, programs
from gtalign_jax.rollout.decode_state import DecodeState, Pause
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.programs import Compile
from gtalign_jax.rollout.request import Rules
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.types import Completions, PromptBatch, PyTree, Rollout

FIRST_SHRINK = 2  # the second stage has half of the rows, because a step of all rows costs most
SHRINK = 4  # a later one has a quarter of the stage before, so that few programs are compiled
MIN_ROWS = 4  # between these and one row little is gained: the weights are read once a step


@dataclasses.dataclass(frozen=True, eq=False)
class Decoding:
    """What every decode step of a generation is given, and when its loop pauses.

    weights: prepared params. until: tokens a row may write. every: steps from one gathering of the live rows
    to the next, at least; 0 for none. sizes: rows of each stage (`batch_sizes`).
    """

    weights: PyTree
    config: ModelConfig
    sampling: SamplingConfig
    rules: Rules
    until: int
    every: int
    sizes: Sequence[int]


def make_decoding(engine: Engine, weights: PyTree, rules: Rules, until: int, rows: int) -> Decoding:
    """The decoding of an engine that begins with so many rows; weights: prepared."""
    return Decoding(
        weights=weights,
        config=engine.model_config,
        sampling=engine.sampling,
        rules=rules,
        until=until,
        every=engine.compact_every,
        sizes=batch_sizes(rows, placing.shards(engine)),
    )


def batch_sizes(rows: int, shards: int) -> tuple[int, ...]:
    """Rows of each stage, largest first, in multiples of the shards after the first.

    The last stage is one row a shard: a lone long answer takes about a third of a step of eight rows on
    CPU (7.8 against 20.6 ms for 32.5M parameters on one core).
    """
    sizes, shrink = [rows], FIRST_SHRINK
    while (smaller := -(-sizes[-1] // shrink // shards) * shards) >= MIN_ROWS and smaller < sizes[-1]:
        sizes.append(smaller)
        shrink = SHRINK
    return (*sizes, shards) if shards < sizes[-1] else tuple(sizes)


def advance(decoding: Decoding, state: DecodeState, pause: Pause) -> DecodeState:
    """Decide tokens until the pause, or until every row is finished or has its tokens; consumes the state."""
    return programs.advance(
        decoding.weights,
        decoding.config,
        state,
        decoding.sampling,
        decoding.rules,
        until=np.int32(decoding.until),
        pause=pause,
    )


def finish(decoding: Decoding, state: DecodeState) -> Rollout:
    """Advance a state until every row is finished or has its tokens; the result is on the host."""
    prompts, group_size, slots = state.completions.tokens.shape
    batch = jax.tree.map(np.array, processes.fetch(state.prompts))  # a copy: advancing consumes the state
    written = empty_rows(prompts * group_size, slots)
    drain(decoding, state, written, np.arange(prompts * group_size))
    return as_rollout(written, batch, group_size)


def drain(decoding: Decoding, state: DecodeState, written: Completions, owner: np.ndarray) -> None:
    """Advance until every row is finished or has its tokens, and write them all.

    written: as of `empty_rows`. owner [B]: which row of it each row of the state is, -1 for none.
    """
    sizes, after = decoding.sizes, 0
    while True:
        enough = max((s for s in sizes if s < len(owner)), default=0) if decoding.every else 0
        state = advance(decoding, state, Pause(np.int32(enough), np.int32(after)))
        live = live_rows(state, decoding.until)
        size = min(s for s in sizes if s >= live.sum())
        if not live.any() or size < len(owner):
            write_rows(written, owner, state)
        if not live.any():
            return
        if size < len(owner):
            chosen = np.argsort(~live, kind="stable")[:size].astype(np.int32)
            state, owner = programs.take(decoding.config, state, chosen), owner[chosen]
            after = int(state.t) + decoding.every


def compile_first(compiling: Compile, decoding: Decoding, state: PyTree) -> None:
    """Have the steps of all rows compiled, the largest program; state: its shapes."""
    args = (decoding.weights, decoding.config, state, decoding.sampling, decoding.rules)
    pause = Pause(np.int32(0), np.int32(0))
    programs.outcome(compiling, programs.advance, *args, until=np.int32(0), pause=pause)


def warm_up(decoding: Decoding, state: DecodeState) -> DecodeState:
    """Compile the steps of every size and every move between sizes; the state is consumed and given back."""
    decoding, sizes = dataclasses.replace(decoding, until=0), decoding.sizes
    pause = Pause(np.int32(0), np.int32(0))
    for _ in range(2):  # what begins may lie otherwise on the devices than what goes on
        state = advance(decoding, state, pause)
    for i, size in enumerate(sizes):
        stage = state if i == 0 else programs.take(decoding.config, state, np.arange(size, dtype=np.int32))
        for smaller in sizes[i + 1 :]:
            programs.take(decoding.config, stage, np.arange(smaller, dtype=np.int32))
        if i > 0:
            advance(decoding, stage, pause)
    return state


def live_rows(state: DecodeState, until: int) -> np.ndarray:
    """[P*G] bool on every host: the rows that are not finished and have fewer than `until` tokens."""
    t, start, finished = processes.fetch((state.t, state.start, state.completions.finished))
    decided = t if start is None else t - start
    return (~np.asarray(finished) & (decided < until)).reshape(-1)


def empty_rows(rows: int, slots: int) -> Completions:
    """Room for a result of B = rows: host arrays [B, N] and [B], which `write_rows` fills."""
    return Completions(
        tokens=np.zeros((rows, slots), np.int32),
        length=np.zeros(rows, np.int32),
        finished=np.zeros(rows, bool),
        logp=np.zeros((rows, slots), np.float32),
        action_mask=np.zeros((rows, slots), bool),
    )


def write_rows(written: Completions, owner: np.ndarray, state: DecodeState) -> None:
    """Copy the rows of the state to those of the result that own them [P*G]; -1 is none."""
    rows, start = processes.fetch((state.completions, state.start))
    rows = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), rows)
    if start is not None:
        rows = _straight(rows, start)
    owned = owner >= 0
    for into, values in zip(jax.tree.leaves(written), jax.tree.leaves(rows), strict=True):
        # A state that was only begun has fewer slots than the result.
        into = into[:, : values.shape[1]] if values.ndim == 2 else into
        into[owner[owned]] = values[owned]


def _straight(rows: Completions, start: np.ndarray) -> Completions:
    """Rows [B, N] with token n of each in slot n, and not in (start + n) % N; start [B, 1]."""
    number = np.arange(rows.tokens.shape[1])
    slot, inside = (start + number) % len(number), number < rows.length[:, None]

    def turned(values: np.ndarray) -> np.ndarray:
        return np.where(inside, np.take_along_axis(values, slot, axis=1), np.zeros((), values.dtype))

    return rows.replace(
        tokens=turned(rows.tokens), logp=turned(rows.logp), action_mask=turned(rows.action_mask)
    )


def as_rollout(written: Completions, prompts: PromptBatch, group_size: int) -> Rollout:
    """The rows of P prompts with their prompts."""
    rows = jax.tree.map(lambda x: x.reshape(-1, group_size, *x.shape[1:]), written)
    return Rollout(prompts, rows)
