"""Continuous batching without an end: rows with rules of their own sit down one by one and leave when done.

    places      = open_places(engine, params, count)
    state       = empty(places)
    state       = seat(places, state, row, place)     its prompt computed, its token 0 drawn
    state       = reseat(places, state, row, place, kept)   a row that goes on from the one which sits there
    state, new  = advance(places, state)              the next STEPS tokens of every row, and a look at them
    scores      = score(places, prompt)               what the model thought of a prompt; no row sits for it

`refill` knows its prompts beforehand and answers when all are done; here nobody knows who comes next. Rows
decode in the same ring of places (`rollout.ring`). What a row draws depends on its seed alone, never on its
neighbours or its place. A place is taken again by seating another row in it, whether its row is done or not.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from gtalign_jax.errors import UserError
from gtalign_jax.rollout import grammar, placing, programs, ring
from gtalign_jax.rollout.decode_state import DecodeState, Pause
from gtalign_jax.rollout.engine import Engine, make_ending, prompt_slots
from gtalign_jax.rollout.grammar import Constraint
from gtalign_jax.rollout.prompt_scores import PromptScores
from gtalign_jax.rollout.request import Own, Placed, Rules
from gtalign_jax.types import Array, PromptBatch, PyTree

TOP = 20  # most likely tokens that may be asked for
PROMPT_TOP = 5  # and of a given text's, as the protocol has it
WIDTHS = (48, 96, 192)  # tokens that `reseat` computes at once: an edited matrix, perhaps an analysis
STEPS = 8  # decode steps between two looks: a token waits for so many, and the host's work is paid once


@dataclasses.dataclass(frozen=True)
class Row:
    """What one row is asked for.

    prompt: token ids. seed: names its random stream, 0 to 2^31 - 1. max_new_tokens: at least 1. temperature:
    0 is greedy. top_p: in (0, 1]. first: the number of its token 0 in the stream: how many tokens were
    written before, where a row goes on from a prompt that holds them. top: the TOP most likely tokens are
    told beside each. held: to the grammar, as a chain whose first `first` tokens end the prompt. stops: a
    stop string of the places ends it.
    """

    prompt: Sequence[int]
    seed: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    first: int = 0
    top: bool = False
    held: bool = False
    stops: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """A fixed number of places and all that rows in them share.

    params: for prompts. weights: the same, prepared for decode steps. key: the streams' common key.
    """

    engine: Engine
    params: PyTree
    weights: PyTree
    rules: Rules
    key: Array
    count: int

    @property
    def slots(self) -> int:
        """Completion slots N: the most tokens a row may write."""
        return self.engine.buckets.completion[-1]


def open_places(
    engine: Engine,
    params: PyTree,
    count: int,
    constraint: Constraint | None = None,
    stops: Sequence[str] = (),
) -> Places:
    """So many places on the device; constraint: the grammar of rows that are held; stops: of those that stop.

    UserError for what one process with one device cannot serve.
    """
    if engine.mesh is not None or jax.process_count() > 1:
        raise UserError("serving: rows come one by one, so it needs one process and one device; give no mesh")
    if engine.buckets.completion[-1] <= STEPS:
        raise UserError(f"serving: buckets.completion={engine.buckets.completion}: needs more than {STEPS}")
    weights = programs.prepare(params, engine.model_config)
    rules = Rules(make_ending(engine, stops), constraint)
    return Places(engine, params, weights, rules, jax.random.key(0), count)


def empty(places: Places) -> DecodeState:
    """Nobody has sat down."""
    longest = [0] * places.engine.buckets.prompt[-1]
    nobody = np.full(places.count, -1, np.int32)
    waiting = _start(places, Row(longest, 0, 1))
    config = places.engine.model_config
    return programs.seat(places.weights, config, waiting, nobody, max_new_tokens=places.slots)


def check_row(places: Places, row: Row) -> None:
    """UserError for a row that no place holds."""
    if not len(row.prompt):
        raise UserError("the prompt has no tokens; it needs at least one")
    prompt_slots(places.engine, row.prompt)
    if not 1 <= row.max_new_tokens <= places.slots:
        raise UserError(f"max_new_tokens={row.max_new_tokens}: must be from 1 to {places.slots}")
    if row.held and places.rules.constraint is None:
        raise UserError("held to the grammar: these places have none; open them with one")
    if row.stops and places.rules.ending.stop is None:
        raise UserError("ended by a stop string: these places have none; open them with one")


def seat(places: Places, state: DecodeState, row: Row, place: int) -> DecodeState:
    """The state, which is consumed, with the row in a place; a place beyond the last takes no row."""
    check_row(places, row)
    return _seat(places, state, _start(places, row), place)


def reseat(places: Places, state: DecodeState, row: Row, place: int, kept: int) -> DecodeState | None:
    """The state, which is consumed, with the row in the place of another.

    The row's prompt begins with `kept` tokens of the other, of its prompt and of what it has written but for
    the last; only what follows them is computed. None, and nothing consumed, where that is too much at once,
    or where the other ended so long ago that its tokens were written over.
    """
    check_row(places, row)
    t, start = jax.device_get((state.t, state.start))
    if place < places.count and t - start[place, 0] > places.slots:
        return None
    width = next((width for width in WIDTHS if len(row.prompt) - kept <= width), None)
    if width is None:
        return None
    config, slots = places.engine.model_config, places.engine.buckets.prompt[-1]
    placed, source = _placed(places, row, slots), (state, np.int32(place), np.int32(kept))
    waiting = programs.start_from(
        places.params, config, placed, places.engine.sampling, places.rules, source, width=width
    )
    return _seat(places, state, waiting, place)


def _seat(places: Places, state: DecodeState, waiting: DecodeState, place: int) -> DecodeState:
    first, at = np.zeros(1, np.int32), np.asarray([place], np.int32)
    return programs.refill(places.engine.model_config, state, waiting, first, at)


def advance(places: Places, state: DecodeState) -> tuple[DecodeState, ring.Newest]:
    """At most STEPS tokens of every row, fewer when all are done; the state is consumed.

    The window, on the host, holds one column more: the token 0 of a row seated since the last look.
    """
    config = places.engine.model_config
    after = np.asarray(jax.device_get(state.t)) + np.int32(STEPS)
    state = programs.advance(
        places.weights,
        config,
        state,
        places.engine.sampling,
        places.rules,
        until=np.int32(places.slots),
        pause=Pause(np.int32(places.count), after),
    )
    state, seen = programs.newest(config, state, steps=STEPS + 1)
    return state, jax.device_get(seen)


def score(places: Places, prompt: Sequence[int]) -> PromptScores:
    """What the model thought of a prompt's tokens, on the host, with the PROMPT_TOP likeliest beside each."""
    config, count = places.engine.model_config, len(prompt)
    tokens = np.zeros(prompt_slots(places.engine, prompt), np.int32)
    tokens[:count] = prompt
    found = programs.score(places.params, config, tokens, top=min(PROMPT_TOP, config.vocab_size))
    return jax.tree.map(lambda x: x[: count - 1], jax.device_get(found))


def warm_up(places: Places) -> DecodeState:
    """Compile all that serving runs, for every bucket of prompts; the empty state."""
    state = empty(places)
    for width in places.engine.buckets.prompt:
        score(places, [0] * width)
        # Twice, because each program is given what the other returned.
        for _ in range(2):
            state = seat(places, state, Row([0] * width, 0, 1), places.count)
            state, _ = advance(places, state)
    longest = places.engine.buckets.prompt[-1]
    for width in [width for width in WIDTHS if longest > 1]:
        count = min(width + 1, longest)
        going_on = reseat(places, state, Row([0] * count, 0, 1), places.count, count - min(width, count - 1))
        assert going_on is not None
        state, _ = advance(places, going_on)
    return state


def _start(places: Places, row: Row) -> DecodeState:
    """The row's prompt computed and its token 0 drawn, in a state of one place."""
    engine = places.engine
    placed = _placed(places, row, prompt_slots(engine, row.prompt))
    return programs.start(places.params, engine.model_config, placed, engine.sampling, places.rules)


def _placed(places: Places, row: Row, slots: int) -> Placed:
    """The row as the programs take it, its prompt in so many slots."""
    engine, constraint = places.engine, places.rules.constraint
    at = 0
    if constraint is not None:
        begun = row.prompt[len(row.prompt) - row.first :]
        at = grammar.reached(constraint, begun) if row.held else grammar.free(constraint)

    def each(value: float, dtype: type) -> np.ndarray:
        return np.full((1, 1), value, dtype)

    tokens = np.zeros((1, slots), np.int32)
    tokens[0, : len(row.prompt)] = row.prompt
    prompts = PromptBatch(tokens, np.asarray([len(row.prompt)], np.int32))
    return Placed(
        prompts=placing.place_prompts(engine, prompts, 1),
        key=places.key,
        group_size=1,
        slots=1,
        row=each(row.seed, np.int32),
        own=Own(
            temperature=each(row.temperature, np.float32),
            top_p=each(row.top_p, np.float32),
            until=each(row.max_new_tokens, np.int32),
            first=each(row.first, np.int32),
            at=each(at, np.int32),
            top=each(row.top, np.bool_),
            stops=each(row.stops, np.bool_),
        ),
        top=min(TOP, engine.model_config.vocab_size),
    )
