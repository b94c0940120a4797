"""Whether a program finds the memory that it needs, before it runs, and one line where it did not."""

import contextlib
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.stages import Compiled, Lowered

from gtalign_jax.errors import UserError, out_of_memory
from gtalign_jax.mesh import processes

GIB = 2**30
_HOST = pathlib.Path("/proc/meminfo")
PyTree = Any


class Purpose(NamedTuple):
    """name: of a program, in messages. mend: the fields that have it take less."""

    name: str
    mend: str


# What saves memory in any gradient. On a CPU only layers in one scan are worth making again.
_LESS = (
    "set config.start.remat=dots or full (on a CPU also start.scan_layers), or split more with config.mesh"
)
LOAD = Purpose("the model", "set config.start.param_dtype=bfloat16, or split more with config.mesh")
LOAD_JUDGE = Purpose("the judge", "set config.start.compute_dtype=bfloat16, or split more with config.mesh")
JUDGE = Purpose("judging", "lower config.judge.questions, answers or question_slots")
COLD_START = Purpose("sft update", f"raise config.sft.microbatches, {_LESS}")
UPDATE = Purpose("update", f"raise config.algorithm.microbatches, {_LESS}")
PART = Purpose("a micro-batch", f"lower config.algorithm.microbatch_tokens, {_LESS}")
EXPERIENCE = Purpose(
    "experience",
    "raise config.algorithm.microbatches, lower config.align.prompts, or split more with config.mesh",
)
GENERATION = Purpose(
    "generation",
    "lower config.align.rollout_prompts, engine.rows or max_new_tokens, or split more with config.mesh",
)
EVALUATION = Purpose(
    "evaluation",
    "lower config.evaluate.prompts, engine.rows or max_new_tokens, or split more with config.mesh",
)


def compile_to_fit(lowered: Lowered, purpose: Purpose, beside: float = 0.0) -> Compiled:
    """The compiled program.

    beside: bytes of its arguments on a device that are not there yet. Raises UserError, on all processes,
    where one of them has too little memory for it: a line with the program's name, its need, what is free,
    and the mend.
    """
    compiled = lowered.compile()
    processes.on_each(lambda: check_fits(compiled, purpose, beside))
    return compiled


def check_fits(compiled: Compiled, purpose: Purpose, beside: float = 0.0) -> None:
    """UserError where a device has less memory free than the program takes beside what is there."""
    needed, free = taken(compiled) + beside, free_bytes()
    if free is not None and needed > free:
        raise UserError(
            f"out of memory: {purpose.name} needs {needed / GIB:.1f} GiB beside what it is given, and a "
            f"device has {free / GIB:.1f} GiB free; {purpose.mend}"
        )


@contextlib.contextmanager
def told(purpose: Purpose) -> Iterator[None]:
    """Memory that was not to be had in the block as the line of `check_fits`, as far as it is known."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = out_of_memory(error)
        if said is None:
            raise
        free = free_bytes()
        has = "" if free is None else f", and a device has {free / GIB:.1f} GiB free"
        raise UserError(f"out of memory: {purpose.name} ({said}){has}; {purpose.mend}") from error


def taken(compiled: Compiled) -> float:
    """Bytes on a device for temporaries, and for results that take the place of no argument."""
    stats: Any = compiled.memory_analysis()
    return float(stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes)


def device_bytes(tree: PyTree) -> float:
    """Bytes of abstract arrays on one device; what waits in the host's memory is not among them.

    Arrays that are there count nothing.
    """
    total = 0
    for x in jax.tree.leaves(tree):
        if not isinstance(x, jax.ShapeDtypeStruct) or jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
            continue
        if x.sharding is None:
            total += math.prod(x.shape) * x.dtype.itemsize
        elif x.sharding.memory_kind != "pinned_host":
            total += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return float(total)


def free_bytes() -> float | None:
    """Bytes free on each of this host's devices, which may be parts of its own memory; None: not known."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"] - stats["bytes_in_use"])
    if device.platform != "cpu" or not _HOST.exists():
        return None
    kilobytes = next(
        line.split()[1] for line in _HOST.read_text().splitlines() if line.startswith("MemAvailable")
    )
    return 1024 * float(kilobytes) / jax.local_device_count()
