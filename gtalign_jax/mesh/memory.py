"""Whether a program finds the memory that it needs, before it runs."""

import pathlib
from typing import Any

import jax
from jax.stages import Compiled, Lowered

from gtalign_jax.errors import UserError
from gtalign_jax.mesh import processes

GIB = 2**30
_HOST = pathlib.Path("/proc/meminfo")


# What saves memory in any update. On a CPU only layers in one scan are worth making again.
_LESS = (
    "set config.start.remat=dots or full (on a CPU also start.scan_layers), or split more with config.mesh"
)


def compile_to_fit(lowered: Lowered, name: str, mend: str) -> Compiled:
    """The compiled program of an update.

    Raises UserError, on all processes, where one of them has too little memory for it: a line with the
    program's name, its need, what is free, and the mend.
    """
    compiled = lowered.compile()
    processes.on_each(lambda: check_fits(compiled, name, mend))
    return compiled


def check_fits(compiled: Compiled, name: str, mend: str) -> None:
    """UserError where a device has less memory free than the program takes beside its arguments."""
    needed, free = taken(compiled), free_bytes()
    if free is not None and needed > free:
        raise UserError(
            f"out of memory: {name} needs {needed / GIB:.1f} GiB beside what it is given, and a device has "
            f"{free / GIB:.1f} GiB free; {mend}, {_LESS}"
        )


def taken(compiled: Compiled) -> float:
    """Bytes on a device for temporaries, and for results that take the place of no argument."""
    stats: Any = compiled.memory_analysis()
    return float(stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes)


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
