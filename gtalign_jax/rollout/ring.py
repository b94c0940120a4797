"""Rows that begin at different times in one batch: places, and the rows that take them. Pure functions.

    waiting = start(...) with one slot            prompts computed once a group, token 0 drawn
    state   = seat(params, config, waiting, row)  R places with one row each: P = R, G = 1
    state   = advance(..., pause=...)             until enough rows are done
    state   = refill(state, waiting, row, place)  waiting rows in the places of rows that are done
    state, new = newest(state, steps)             the last tokens of every place, for those who cannot wait

All rows write the same slot t % N of their caches, one update in place a step whatever their age. A row
that sits down at step t has start = t - 1: its token 0 is in slot t - 1, and the slots that an earlier row
left behind are older than that, so attention does not see them and nothing is cleared.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gtalign_jax.mesh.sharding import constrain
from gtalign_jax.models import layouts
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.layers import BATCH
from gtalign_jax.rollout.decode_state import DecodeState, Likely
from gtalign_jax.types import Array, Completions, PyTree

LONG_OVER = 2**30  # steps
_PER_PROMPT = ("prompts", "prompt_cache")
_PER_ROW = ("keys", "completions", "stop_state", "seen", "grammar", "start", "own", "likely")


class Newest(NamedTuple):
    """A window of the last W steps over R places.

    tokens [R, W] int32, logp [R, W] float32: column w is the row's token number first + w, written where
    0 <= first + w < length. length, first [R] int32; finished [R] bool. likely: [R, W, K], or None.
    """

    tokens: Array
    logp: Array
    length: Array
    finished: Array
    first: Array
    likely: Likely | None = None


def take_rows(state: DecodeState, row: Array) -> DecodeState:
    """The rows p*G + g listed in row [R], as R prompts with one sample each: P = R, G = 1.

    Each row draws what it would have drawn in place, because its key goes with it.
    """
    prompt = row // state.completions.length.shape[1]

    def of_row(x: Array) -> Array:
        return x.reshape(-1, 1, *x.shape[2:])[row]

    taken = _mapped(_PER_ROW, of_row, state)
    taken = _mapped(_PER_PROMPT, lambda x: x[prompt], taken)
    return taken.replace(cache=layouts.take_rows(state.cache, row))


def _mapped(names: Sequence[str], function: Callable[..., Array], *states: DecodeState) -> DecodeState:
    """The first state with function(its array, those of the others in the same place) in these fields."""
    fields = {name: [getattr(state, name) for state in states] for name in names}
    return states[0].replace(**{name: jax.tree.map(function, *trees) for name, trees in fields.items()})


def seat(
    params: PyTree, config: ModelConfig, waiting: DecodeState, row: Array, max_new_tokens: int
) -> DecodeState:
    """R places with the rows listed in row [R] int32 of a state at step 1; -1 leaves a place empty."""
    state = take_rows(waiting, jnp.maximum(row, 0))
    first = state.completions

    def pad(x: Array) -> Array:
        room = max_new_tokens - x.shape[2]
        return jnp.pad(x, [(0, room if axis == 2 else 0) for axis in range(x.ndim)])

    completions = first.replace(
        tokens=pad(first.tokens),
        finished=first.finished | (row < 0)[:, None],
        logp=pad(first.logp),
        action_mask=pad(first.action_mask),
    )
    return laid_out(
        config,
        state.replace(
            cache=layouts.init_decode_cache(params, config, row.shape[0], 1, max_new_tokens),
            completions=completions,
            likely=jax.tree.map(pad, state.likely),
            start=jnp.zeros((row.shape[0], 1), jnp.int32),
        ),
    )


def refill(
    config: ModelConfig, state: DecodeState, waiting: DecodeState, row: Array, place: Array
) -> DecodeState:
    """The state with row[k] of `waiting` in place[k], both [K] int32; a place of R or more takes no row.

    The prompts of `waiting` may have fewer slots than the places.
    """
    fresh, first = _widened(take_rows(waiting, row), state.prompts.tokens.shape[1]), state.t - 1
    old, new = state.completions, fresh.completions

    def put(old: Array, new: Array) -> Array:
        return old.at[place].set(new, mode="drop")

    def put_first(old: Array, new: Array) -> Array:
        return old.at[place, :, first % old.shape[2]].set(new[:, :, 0], mode="drop")

    names = (*_PER_PROMPT, "keys", "stop_state", "seen", "grammar", "own")
    seated = _mapped(names, put, state, fresh).replace(
        completions=Completions(
            tokens=put_first(old.tokens, new.tokens),
            length=put(old.length, new.length),
            finished=put(old.finished, new.finished),
            logp=put_first(old.logp, new.logp),
            action_mask=put_first(old.action_mask, new.action_mask),
        ),
        likely=jax.tree.map(put_first, state.likely, fresh.likely),
        start=put(state.start, jnp.full((row.shape[0], 1), first)),
    )
    return laid_out(config, seated)


def _widened(state: DecodeState, slots: int) -> DecodeState:
    """The state with so many prompt slots."""
    spare = slots - state.prompts.tokens.shape[1]
    if not spare:
        return state
    prompts = state.prompts.replace(tokens=jnp.pad(state.prompts.tokens, ((0, 0), (0, spare))))
    return state.replace(
        prompts=prompts, prompt_cache=layouts.widened(state.prompt_cache, state.cache, spare)
    )


def newest(state: DecodeState, steps: int) -> tuple[DecodeState, Newest]:
    """What the places have written in the last `steps` steps, steps <= N, and the state, where t begins
    again so that no count ever overflows."""
    made, start = state.completions, state.start
    assert start is not None  # places began at different times
    slots = made.tokens.shape[2]
    slot = (state.t - steps + jnp.arange(steps)) % slots
    seen = Newest(
        tokens=made.tokens[:, 0, slot],
        logp=made.logp[:, 0, slot],
        length=made.length[:, 0],
        finished=made.finished[:, 0],
        first=state.t - steps - start[:, 0],
        likely=jax.tree.map(lambda x: x[:, 0, slot], state.likely),
    )
    # Whole turns of the ring, so that every token stays in its slot; a row long over may not fall for ever.
    turns = state.t // slots * slots - slots
    return state.replace(t=state.t - turns, start=jnp.maximum(start - turns, -LONG_OVER)), seen


def laid_out(config: ModelConfig, state: DecodeState) -> DecodeState:
    """The state with its rows spread over the mesh, always alike, so that no call is compiled for another's
    layout of the same arrays."""

    def spread(x: Array, names: Sequence[str]) -> Array:
        return constrain(x, *[*names, *["width"] * x.ndim][: x.ndim])

    with layouts.stepping(config):
        prompt_cache, cache = layouts.spread_caches(state.prompt_cache, state.cache)
        laid = _mapped((*_PER_ROW, "t"), lambda x: spread(x, BATCH), state)
        laid = _mapped(["prompts"], lambda x: spread(x, ["batch"]), laid)
        return laid.replace(prompt_cache=prompt_cache, cache=cache)
