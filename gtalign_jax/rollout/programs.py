"""The compiled functions of generation, and a count of how often each was traced."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence

import jax

from gtalign_jax.models.layouts import prepare_decode
from gtalign_jax.rollout import decode
from gtalign_jax.rollout.decode import DecodeState
from gtalign_jax.types import Array

_TRACED: collections.Counter[str] = collections.Counter()
_SHAPES = ("config", "sampling", "group_size", "max_new_tokens")


def take_rows(state: DecodeState, row: Array) -> DecodeState:
    """The rows p*G + g listed in row [R], as R prompts with one sample each: P = R, G = 1.

    Each row draws what it would have drawn in place, because its key goes with it.
    """
    prompt = row // state.done.shape[1]
    per_prompt = {"prompts": state.prompts, "prompt_cache": state.prompt_cache}
    per_row = {
        name: getattr(state, name) for name in state.__dataclass_fields__ if name not in (*per_prompt, "t")
    }
    pick = lambda x: x.reshape(-1, 1, *x.shape[2:])[row]
    return state.replace(**jax.tree.map(lambda x: x[prompt], per_prompt), **jax.tree.map(pick, per_row))


def _program(function: Callable, static: Sequence[str] = (), donate: Sequence[str] = ()) -> Callable:
    """jit that counts its traces under the function's name."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        _TRACED[function.__name__] += 1
        return function(*args, **kwargs)

    return jax.jit(traced, static_argnames=static, donate_argnames=donate)


generate = _program(decode.generate, _SHAPES)
prepare = _program(prepare_decode, ("config",))
start = _program(decode.start, _SHAPES)
advance = _program(decode.advance, ("config", "sampling"), donate=("state",))
rewind = _program(decode.rewind, donate=("state",))
take = _program(take_rows)


def compiled_programs() -> dict[str, int]:
    """How many distinct programs (shapes and settings) this process has traced, by function."""
    return dict(_TRACED)
