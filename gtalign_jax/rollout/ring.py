"""Rows that begin at different times in one batch: places, and the rows that take them. Pure functions.

    waiting = start(..., max_new_tokens=1)        prompts computed once a group, token 0 drawn
    state   = seat(params, config, waiting, row)  R places with one row each: P = R, G = 1
    state   = advance(..., pause=...)             until enough rows are done
    state   = refill(state, waiting, row, place)  waiting rows in the places of rows that are done

All rows write the same slot t % N of their caches, one update in place a step whatever their age. A row
that sits down at step t has start = t - 1: its token 0 is in slot t - 1, and the slots that an earlier row
left behind are older than that, so attention does not see them and nothing is cleared.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gtalign_jax.mesh.sharding import constrain
from gtalign_jax.models import layouts
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.layers import BATCH
from gtalign_jax.rollout.decode_state import DecodeState
from gtalign_jax.types import Array, PyTree

_SLOTTED = ("tokens", "logp", "action_mask")


def take_rows(state: DecodeState, row: Array) -> DecodeState:
    """The rows p*G + g listed in row [R], as R prompts with one sample each: P = R, G = 1.

    Each row draws what it would have drawn in place, because its key goes with it.
    """
    prompt = row // state.done.shape[1]
    per_prompt = {"prompts": state.prompts, "prompt_cache": state.prompt_cache}
    others = set(state.__dataclass_fields__) - {*per_prompt, "cache", "t"}
    per_row = {name: getattr(state, name) for name in others}
    pick = lambda x: x.reshape(-1, 1, *x.shape[2:])[row]
    return state.replace(
        cache=layouts.take_rows(state.cache, row),
        **jax.tree.map(lambda x: x[prompt], per_prompt),
        **jax.tree.map(pick, per_row),
    )


def seat(
    params: PyTree, config: ModelConfig, waiting: DecodeState, row: Array, max_new_tokens: int
) -> DecodeState:
    """R places with the rows listed in row [R] int32 of a state at step 1; -1 leaves a place empty."""
    state = take_rows(waiting, jnp.maximum(row, 0))
    slots = [(0, 0), (0, 0), (0, max_new_tokens - waiting.tokens.shape[2])]
    return laid_out(
        config,
        state.replace(
            cache=layouts.init_decode_cache(params, config, row.shape[0], 1, max_new_tokens),
            done=state.done | (row < 0)[:, None],
            start=jnp.zeros((row.shape[0], 1), jnp.int32),
            **{name: jnp.pad(getattr(state, name), slots) for name in _SLOTTED},
        ),
    )


def refill(
    config: ModelConfig, state: DecodeState, waiting: DecodeState, row: Array, place: Array
) -> DecodeState:
    """The state with row[k] of `waiting` in place[k], both [K] int32; a place of R or more takes no row."""
    fresh, first = take_rows(waiting, row), state.t - 1
    put = lambda old, new: old.at[place].set(new, mode="drop")
    names = ("prompts", "prompt_cache", "keys", "length", "done", "stop_state", "seen", "grammar")
    moved = {name: jax.tree.map(put, getattr(state, name), getattr(fresh, name)) for name in names}
    for name in _SLOTTED:
        old, new = getattr(state, name), getattr(fresh, name)[..., 0]
        moved[name] = old.at[place, :, first % old.shape[2]].set(new, mode="drop")
    start = put(state.start, jnp.full((row.shape[0], 1), first))
    return laid_out(config, state.replace(start=start, **moved))


def laid_out(config: ModelConfig, state: DecodeState) -> DecodeState:
    """The state with its rows spread over the mesh, always alike, so that no call is compiled for another's
    layout of the same arrays."""
    with layouts.stepping(config):
        prompt_cache, cache = layouts.spread_caches(state.prompt_cache, state.cache)
        spread = lambda x, names: constrain(x, *[*names, *["width"] * x.ndim][: x.ndim])
        prompts = jax.tree.map(lambda x: spread(x, ["batch"]), state.prompts)
        names = set(state.__dataclass_fields__) - {"prompts", "prompt_cache", "cache"}
        per_row = {name: getattr(state, name) for name in names}
        per_row = jax.tree.map(lambda x: spread(x, BATCH), per_row)
        return state.replace(prompts=prompts, prompt_cache=prompt_cache, cache=cache, **per_row)
