"""The compiled functions of generation, and a count of how often each was traced."""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.stages import Compiled, Lowered, Wrapped

from gtalign_jax.mesh.memory import device_bytes
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.layouts import prepare_decode
from gtalign_jax.rollout import decode, ring
from gtalign_jax.rollout.decode_state import DecodeState, Forced, Pause
from gtalign_jax.rollout.prompt_scores import prompt_scores
from gtalign_jax.rollout.request import Rules
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.types import Array, PyTree

# Compiles a program, given the bytes of its arguments that are not on a device yet.
Compile = Callable[[Lowered, float], Compiled]

_TRACED: collections.Counter[str] = collections.Counter()
_STATIC = ("config", "sampling")


def advance_rows(
    params: PyTree,
    config: ModelConfig,
    state: DecodeState,
    sampling: SamplingConfig,
    rules: Rules,
    *,
    until: Array,
    pause: Pause | None = None,
    forced: Forced | None = None,
) -> DecodeState:
    """`decode.advance`; what it pauses keeps its layout, because it comes back to the same programs."""
    advanced = decode.advance(params, config, state, sampling, rules, until=until, pause=pause, forced=forced)
    return advanced if pause is None else ring.laid_out(config, advanced)


def take_rows(config: ModelConfig, state: DecodeState, row: Array) -> DecodeState:
    """`ring.take_rows` in the layout that decoding keeps."""
    return ring.laid_out(config, ring.take_rows(state, row))


def newest_rows(config: ModelConfig, state: DecodeState, steps: int) -> tuple[DecodeState, ring.Newest]:
    """`ring.newest` in the layout that decoding keeps."""
    state, seen = ring.newest(state, steps)
    return ring.laid_out(config, state), seen


def _program(function: Callable, static: Sequence[str] = (), donate: Sequence[str] = ()) -> Wrapped:
    """jit that counts its traces under the function's name."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        _TRACED[function.__name__] += 1
        return function(*args, **kwargs)

    return jax.jit(traced, static_argnames=static, donate_argnames=donate)


generate = _program(decode.generate, _STATIC)
prepare = _program(prepare_decode, ("config",))
start = _program(decode.start, _STATIC)
start_from = _program(decode.start_from, (*_STATIC, "width"))
advance = _program(advance_rows, _STATIC, donate=("state",))
rewind = _program(decode.rewind, donate=("state",))
take = _program(take_rows, ("config",))
seat = _program(ring.seat, ("config", "max_new_tokens"))
refill = _program(ring.refill, ("config",), donate=("state",))
newest = _program(newest_rows, ("config", "steps"), donate=("state",))
score = _program(prompt_scores, ("config", "top"))


def compiled_programs() -> dict[str, int]:
    """How many distinct programs (shapes and settings) this process has traced, by function."""
    return dict(_TRACED)


def outcome(compiling: Compile, program: Wrapped, *args: Any, **kwargs: Any) -> PyTree:
    """Have a program compiled for these arguments, arrays or shapes: the shapes and layouts of its result."""
    lowered = program.lower(*args, **kwargs)
    compiled = compiling(lowered, device_bytes((args, kwargs)))
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        lowered.out_info,
        compiled.output_shardings,
    )
