"""Continuous batching: a fixed number of places, and a queue of rows that take them as they become free.

Prompts wait in parts of a few. A part is prefilled when no row of the part before it is left to seat; each
prompt is computed once for all its samples, and token 0 of every row is drawn. Then rows decode together
until a sixteenth of the places is free, the rows that ended are written down, and waiting ones sit down
(`rollout.ring`). When none waits, `compaction.drain` finishes those that are left. The shapes of a part, of
the places and of a refill are fixed, so the same few programs serve any number of prompts.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from gtalign_jax.rollout import compaction, placing, programs
from gtalign_jax.rollout.buckets import bucket
from gtalign_jax.rollout.compaction import Decoding, drain, live_rows, write_rows
from gtalign_jax.rollout.decode_state import DecodeState, Pause
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.programs import Compile
from gtalign_jax.rollout.request import Placed, Request, Rules, row_numbers
from gtalign_jax.types import Completions, PyTree, Rollout

FREE = 16  # rows are seated when one place in so many is free; until then those places cost their step
AT_ONCE = 8  # a refill moves one place in so many


@dataclasses.dataclass(frozen=True, eq=False)
class Floor:
    """A generation with a fixed number of places: what it was asked for, and how its rows decode.

    params: for the prompts, not prepared. request: with any number of prompts on the host. row: of those
    prompts, from `row_numbers`. decoding: of all the places.
    """

    engine: Engine
    params: PyTree
    request: Request
    row: np.ndarray
    decoding: Decoding

    @property
    def places(self) -> int:
        """Rows decoded at a time."""
        return self.decoding.sizes[0]

    @property
    def slots(self) -> int:
        """Completion slots N."""
        return placing.completion_slots(self.engine, self.request.max_new_tokens)

    @property
    def part(self) -> int:
        """Prompts of a part: as many as fill the places, so that one prefill begins."""
        least = -(-self.places // self.request.group_size)
        return least + -least % placing.shards(self.engine)

    @property
    def move(self) -> int:
        """Rows of a refill."""
        return max(1, self.places // AT_ONCE)


@dataclasses.dataclass
class Queue:
    """Rows that wait: of the prefilled part `state`, those in `ready`; then the parts not yet prefilled.

    first: the number that row 0 of `state` has in the result. written: the result.
    """

    parts: Iterator[Placed]
    written: Completions
    state: DecodeState | None = None
    ready: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    first: int = 0

    @property
    def prefilled(self) -> DecodeState:
        """`state`, of which rows are ready."""
        assert self.state is not None  # no row is ready before its part is prefilled
        return self.state


def waits(engine: Engine, count: int, group_size: int) -> bool:
    """Whether some rows of `count` prompts must wait for others."""
    if not engine.rows:
        return False
    beyond = bool(engine.buckets.batch) and count > engine.buckets.batch[-1]
    return beyond or placing.padded(engine, count) * group_size > engine.rows


def rollout(engine: Engine, params: PyTree, request: Request, rules: Rules) -> Rollout:
    """`generate.rollout` with `engine.rows` rows at a time, for any number of prompts; the result is on the
    host."""
    request = request.replace(prompts=jax.device_get(request.prompts))
    prompts, count = request.prompts, request.prompts.tokens.shape[0]
    with placing.on_mesh(engine):
        weights = programs.prepare(params, engine.model_config)
        floor = _make_floor(engine, (params, weights), request, rules)
        firsts = range(0, count, floor.part)
        written = complete(floor, (_part(floor, first) for first in firsts), len(firsts))
    width = bucket(prompts.tokens.shape[1], engine.buckets.prompt, "prompt", "the longest prompt")
    tokens = np.pad(prompts.tokens, ((0, 0), (0, width - prompts.tokens.shape[1])))
    written = jax.tree.map(lambda x: x[: count * request.group_size], written)
    return compaction.as_rollout(written, prompts.replace(tokens=tokens), request.group_size)


def warm_up(engine: Engine, params: PyTree, request: Request, rules: Rules) -> None:
    """Compile all that `rollout` will run for prompts of this width."""
    with placing.on_mesh(engine):
        weights = programs.prepare(params, engine.model_config)
        floor = _make_floor(engine, (params, weights), request, rules)
        waiting = _prefill(floor, _part(floor, 0))
        none = np.full(floor.places, -1, np.int32)
        state = _seat(floor, waiting, none)
        idle = dataclasses.replace(floor.decoding, until=0)
        # Twice, because each is called with what the other returned.
        for _ in range(2):
            state = _refill(floor, state, waiting, none[:0], none[:0])
            state = _advance(idle, state, live=0)
        if idle.every:
            compaction.warm_up(idle, state)


def compile_largest(
    compiling: Compile, engine: Engine, params: PyTree, request: Request, rules: Rules
) -> None:
    """Have the programs compiled that `rollout` needs most memory for; params: arrays or their shapes."""
    with placing.on_mesh(engine):
        weights = programs.outcome(compiling, programs.prepare, params, engine.model_config)
        floor = _make_floor(engine, (params, weights), request, rules)
        part, config = _part(floor, 0), engine.model_config
        waiting = programs.outcome(
            compiling, programs.start, params, config, part, engine.sampling, floor.decoding.rules
        )
        nobody = np.full(floor.places, -1, np.int32)
        seated = programs.outcome(
            compiling, programs.seat, weights, config, waiting, nobody, max_new_tokens=floor.slots
        )
        compaction.compile_first(compiling, floor.decoding, seated)


def _make_floor(engine: Engine, held: tuple[PyTree, PyTree], request: Request, rules: Rules) -> Floor:
    """held: parameters, for the prompts and prepared."""
    places = engine.rows + -engine.rows % placing.shards(engine)
    params, weights = held
    decoding = compaction.make_decoding(engine, weights, rules, request.max_new_tokens, places)
    return Floor(engine, params, request, row_numbers(request), decoding)


def _part(floor: Floor, first: int) -> Placed:
    """The prompts from `first` on that make a part, padded to its size; no room for more than one token."""
    rows = slice(first, first + floor.part)
    request = floor.request.replace(prompts=jax.tree.map(lambda x: x[rows], floor.request.prompts))
    return placing.place(floor.engine, request, floor.row[rows], floor.part).replace(slots=1)


def complete(floor: Floor, parts: Iterator[Placed], count: int) -> Completions:
    """The completions of `count` parts on the host: row p*G + g of the prompts in order, [B, N] and [B]."""
    rows = count * floor.part * floor.request.group_size
    queue = Queue(parts, compaction.empty_rows(rows, floor.slots))
    owner = np.full(floor.places, -1)  # which row of the result sits in each place
    busy = floor.places - max(1, floor.places // FREE)
    state = _seat_first(floor, queue, owner)
    while state is not None:
        state = _seat_more(floor, queue, state, owner)
        if not len(queue.ready):
            drain(floor.decoding, state, queue.written, owner)
            break
        state = _advance(floor.decoding, state, live=busy)
        over = ~live_rows(state, floor.decoding.until)
        write_rows(queue.written, np.where(over, owner, -1), state)
        owner[over] = -1
    return queue.written


def _advance(decoding: Decoding, state: DecodeState, *, live: int) -> DecodeState:
    """Decode until at most `live` rows are live."""
    return compaction.advance(decoding, state, Pause(np.int32(live), np.int32(0)))


def _prefill(floor: Floor, part: Placed) -> DecodeState:
    """The prompts of a part computed and token 0 of its rows drawn."""
    engine, rules = floor.engine, floor.decoding.rules
    return programs.start(floor.params, engine.model_config, part, engine.sampling, rules)


def _wait(floor: Floor, queue: Queue) -> None:
    """Prefill parts until a row is ready or no part is left, and write down every row's token 0."""
    while not len(queue.ready):
        part = next(queue.parts, None)
        if part is None:
            return
        rows = floor.part * floor.request.group_size
        queue.first += rows if queue.state is not None else 0
        queue.state = _prefill(floor, part)
        write_rows(queue.written, queue.first + np.arange(rows), queue.state)
        queue.ready = np.flatnonzero(live_rows(queue.state, floor.decoding.until)).astype(np.int32)


def _seat_first(floor: Floor, queue: Queue, owner: np.ndarray) -> DecodeState | None:
    """The places with the first rows that wait; None when no row is longer than one token."""
    _wait(floor, queue)
    if not len(queue.ready):
        return None
    rows = np.full(floor.places, -1, np.int32)
    count = min(len(rows), len(queue.ready))
    rows[:count], queue.ready = queue.ready[:count], queue.ready[count:]
    owner[:count] = queue.first + rows[:count]
    return _seat(floor, queue.prefilled, rows)


def _seat(floor: Floor, waiting: DecodeState, rows: np.ndarray) -> DecodeState:
    """The places with these rows of a part."""
    decoding = floor.decoding
    return programs.seat(decoding.weights, decoding.config, waiting, rows, max_new_tokens=floor.slots)


def _seat_more(floor: Floor, queue: Queue, state: DecodeState, owner: np.ndarray) -> DecodeState:
    """Seat waiting rows until every place is taken, or none waits and `ready` stays empty."""
    _wait(floor, queue)
    while len(free := np.flatnonzero(owner < 0)) and len(queue.ready):
        count = min(floor.move, len(free), len(queue.ready))
        row, queue.ready = queue.ready[:count], queue.ready[count:]
        place = free[:count].astype(np.int32)
        state = _refill(floor, state, queue.prefilled, row, place)
        owner[place] = queue.first + row
        _wait(floor, queue)
    return state


def _refill(
    floor: Floor, state: DecodeState, waiting: DecodeState, row: np.ndarray, place: np.ndarray
) -> DecodeState:
    """Rows of a part in these places, filled up with moves to a place that is not there."""
    spare = (0, floor.move - len(row))
    row, place = np.pad(row, spare), np.pad(place, spare, constant_values=floor.places)
    return programs.refill(floor.decoding.config, state, waiting, row, place)
