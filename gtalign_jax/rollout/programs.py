"""The compiled functions of generation, and a count of how often each was traced."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence

import jax

from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.layouts import prepare_decode
from gtalign_jax.rollout import decode, ring
from gtalign_jax.rollout.decode import DecodeState
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.types import PyTree

_TRACED: collections.Counter[str] = collections.Counter()
_SHAPES = ("config", "sampling", "group_size", "max_new_tokens")


def advance_rows(
    params: PyTree, config: ModelConfig, state: DecodeState, sampling: SamplingConfig, **options
) -> DecodeState:
    """`decode.advance`; a ring keeps its layout, because it comes back to the same programs many times."""
    state = decode.advance(params, config, state, sampling, **options)
    return state if state.start is None else ring.laid_out(config, state)


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
advance = _program(advance_rows, ("config", "sampling"), donate=("state",))
rewind = _program(decode.rewind, donate=("state",))
take = _program(ring.take_rows)
seat = _program(ring.seat, ("config", "max_new_tokens"))
refill = _program(ring.refill, ("config",), donate=("state",))


def compiled_programs() -> dict[str, int]:
    """How many distinct programs (shapes and settings) this process has traced, by function."""
    return dict(_TRACED)
