"""Continuous batching: a fixed number of places, and a queue of rows that take them as they become free.

Prompts wait in parts of a few. A part is prefilled when no row of the part before it is left to seat; each
prompt is computed once for all its samples, and token 0 of every row is drawn. Then rows decode together
until a sixteenth of the places is free, the rows that ended are written down, and waiting ones sit down
(`rollout.ring`). When none waits, `compaction.drain` finishes those that are left. The shapes of a part, of
the places and of a refill are fixed, so the same few programs serve any number of prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gtalign_jax.models.config import ModelConfig
from gtalign_jax.rollout import compaction, placing, programs
from gtalign_jax.rollout.buckets import bucket
from gtalign_jax.rollout.compaction import Written, batch_sizes, drain, live_rows, write_rows
from gtalign_jax.rollout.decode import DecodeState, Pause
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.types import Array, PromptBatch, PyTree, Rollout

if TYPE_CHECKING:
    from gtalign_jax.rollout.engine import Engine

FREE = 16  # rows are seated when one place in so many is free; until then those places cost their step
AT_ONCE = 8  # a refill moves one place in so many

Part = tuple[PromptBatch, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What every program of a generation is given, and the fixed numbers of its shapes.

    weights: prepared params. group_size: samples of a prompt. places: rows decoded at a time. slots:
    completion slots N. until: tokens a row may write. every: steps between two gatherings in the end
    (`compaction.drain`). shards: devices that rows are spread over. options: ending and constraint.
    """

    params: PyTree
    weights: PyTree
    config: ModelConfig
    sampling: SamplingConfig
    key: Array
    group_size: int
    places: int
    slots: int
    until: int
    every: int
    shards: int
    options: dict[str, Any]

    @property
    def part(self) -> int:
        """Prompts of a part: as many as fill the places, so that one prefill begins."""
        least = -(-self.places // self.group_size)
        return least + -least % self.shards

    @property
    def move(self) -> int:
        """Rows of a refill."""
        return max(1, self.places // AT_ONCE)


@dataclasses.dataclass
class Queue:
    """Rows that wait: of the prefilled part `state`, those in `ready`; then the parts not yet prefilled.

    first: the number that row 0 of `state` has in the result. written: the result.
    """

    parts: Iterator[Part]
    written: Written
    state: DecodeState | None = None
    ready: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    first: int = 0


# --- for the engine ------------------------------------------------------------------------------


def waits(engine: Engine, count: int, group_size: int) -> bool:
    """Whether some rows of `count` prompts must wait for others."""
    if not engine.rows:
        return False
    beyond = bool(engine.buckets.batch) and count > engine.buckets.batch[-1]
    return beyond or placing.padded(engine, count) * group_size > engine.rows


def rollout(
    engine: Engine,
    params: PyTree,
    prompts: PromptBatch,
    key: Array,
    row: np.ndarray,
    group_size: int,
    max_new_tokens: int,
    options: dict[str, Any],
) -> Rollout:
    """`engine.rollout` with `engine.rows` rows at a time; the result is on the host.

    prompts: host arrays of any number P. row [P] or [P, G]: their numbers or seeds, as in `decode.start`.
    """
    prompts, count = jax.device_get(prompts), prompts.tokens.shape[0]
    with placing.on_mesh(engine):
        run = _make_run(engine, params, key, group_size, max_new_tokens, options)
        firsts = range(0, count, run.part)
        parts = (_part(engine, prompts, row, slice(i, i + run.part), run.part) for i in firsts)
        written = complete(run, parts, len(firsts))
    width = bucket(prompts.tokens.shape[1], engine.buckets.prompt, "prompt", "the longest prompt")
    tokens = np.pad(prompts.tokens, ((0, 0), (0, width - prompts.tokens.shape[1])))
    written = {name: value[: count * group_size] for name, value in written.items()}
    return compaction.as_rollout(written, prompts.replace(tokens=tokens), group_size)


def warm_up(
    engine: Engine,
    params: PyTree,
    prompts: PromptBatch,
    key: Array,
    group_size: int,
    max_new_tokens: int,
    options: dict[str, Any],
) -> None:
    """Compile all that `rollout` will run for prompts of this width."""
    with placing.on_mesh(engine):
        run = _make_run(engine, params, key, group_size, max_new_tokens, options)
        rows = np.zeros(prompts.tokens.shape[0], np.int32)
        waiting = _prefill(run, _part(engine, prompts, rows, slice(run.part), run.part))
        none = np.full(run.places, -1, np.int32)
        state = programs.seat(run.weights, run.config, waiting, none, max_new_tokens=run.slots)
        # Twice, because each is called with what the other returned.
        for _ in range(2):
            state = programs.refill(run.config, state, waiting, *_moves(run, none[:0], none[:0]))
            state = _advance(run, state, until=0, live=0)
        if run.every:
            sizes = batch_sizes(run.places, run.shards)
            compaction.warm_up(run.weights, run.config, state, run.sampling, sizes=sizes, **run.options)


def _make_run(
    engine: Engine,
    params: PyTree,
    key: Array,
    group_size: int,
    max_new_tokens: int,
    options: dict[str, Any],
) -> Run:
    shards = placing.shards(engine)
    return Run(
        params=params,
        weights=programs.prepare(params, engine.model_config),
        config=engine.model_config,
        sampling=engine.sampling,
        key=key,
        group_size=group_size,
        places=engine.rows + -engine.rows % shards,
        slots=placing.completion_slots(engine, max_new_tokens),
        until=max_new_tokens,
        every=engine.compact_every,
        shards=shards,
        options=options,
    )


def _part(engine: Engine, prompts: PromptBatch, row: np.ndarray, rows: slice, size: int) -> Part:
    """Some of the prompts on the devices, padded to `size`, and their row numbers."""
    cut = jax.tree.map(lambda x: x[rows], prompts)
    return placing.place(engine, cut, size), placing.pad_rows(row[rows], size)


# --- the loop ------------------------------------------------------------------------------------


def complete(run: Run, parts: Iterator[Part], count: int) -> Written:
    """The completions of `count` parts on the host: row p*G + g of the prompts in order.

    parts: `run.part` prompts each on the devices, with their row numbers or seeds.
    """
    queue = Queue(parts, compaction.empty_rows(count * run.part * run.group_size, run.slots))
    owner = np.full(run.places, -1)  # which row of the result sits in each place
    busy = run.places - max(1, run.places // FREE)
    state = _seat_first(run, queue, owner)
    while state is not None:
        state = _seat_more(run, queue, state, owner)
        if not len(queue.ready):
            sizes = batch_sizes(run.places, run.shards)
            ends = {"until": run.until, "every": run.every, "sizes": sizes, **run.options}
            drain(run.weights, run.config, state, run.sampling, written=queue.written, owner=owner, **ends)
            break
        state = _advance(run, state, until=run.until, live=busy)
        over = ~live_rows(state, run.until)
        write_rows(queue.written, np.where(over, owner, -1), state)
        owner[over] = -1
    return queue.written


def _advance(run: Run, state: DecodeState, *, until: int, live: int) -> DecodeState:
    """Decode until at most `live` rows are live."""
    ends = {"until": np.int32(until), "pause": Pause(np.int32(live), np.int32(0)), **run.options}
    return programs.advance(run.weights, run.config, state, run.sampling, **ends)


def _prefill(run: Run, part: Part) -> DecodeState:
    """The prompts of a part computed and token 0 of its rows drawn; no room for more tokens."""
    shapes = {"group_size": run.group_size, "max_new_tokens": 1, "row": part[1]}
    return programs.start(run.params, run.config, part[0], run.key, run.sampling, **shapes, **run.options)


def _wait(run: Run, queue: Queue) -> None:
    """Prefill parts until a row is ready or no part is left, and write down every row's token 0."""
    while not len(queue.ready):
        part = next(queue.parts, None)
        if part is None:
            return
        rows = run.part * run.group_size
        queue.first += rows if queue.state is not None else 0
        queue.state = _prefill(run, part)
        write_rows(queue.written, queue.first + np.arange(rows), queue.state)
        queue.ready = np.flatnonzero(live_rows(queue.state, run.until)).astype(np.int32)


def _seat_first(run: Run, queue: Queue, owner: np.ndarray) -> DecodeState | None:
    """The places with the first rows that wait; None when no row is longer than one token."""
    _wait(run, queue)
    if not len(queue.ready):
        return None
    rows = np.full(run.places, -1, np.int32)
    count = min(len(rows), len(queue.ready))
    rows[:count], queue.ready = queue.ready[:count], queue.ready[count:]
    owner[:count] = queue.first + rows[:count]
    return programs.seat(run.weights, run.config, queue.state, rows, max_new_tokens=run.slots)


def _seat_more(run: Run, queue: Queue, state: DecodeState, owner: np.ndarray) -> DecodeState:
    """Seat waiting rows until every place is taken, or none waits and `ready` stays empty."""
    _wait(run, queue)
    while len(free := np.flatnonzero(owner < 0)) and len(queue.ready):
        count = min(run.move, len(free), len(queue.ready))
        row, queue.ready = queue.ready[:count], queue.ready[count:]
        place = free[:count].astype(np.int32)
        state = programs.refill(run.config, state, queue.state, *_moves(run, row, place))
        owner[place] = queue.first + row
        _wait(run, queue)
    return state


def _moves(run: Run, row: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arguments `row` and `place` of a refill, filled up with moves to a place that is not there."""
    spare = (0, run.move - len(row))
    return np.pad(row, spare), np.pad(place, spare, constant_values=run.places)
