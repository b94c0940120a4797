"""TPU chips and topologies that need not be here: published limits, and devices to compile for."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence

import jax

from gtalign_jax.errors import UserError
from gtalign_jax.planning.cost import Collective

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published limits of one chip.

    hbm: usable bytes, a little under the nominal size. flops: bf16 matrix operations a second.
    bandwidth: HBM bytes a second. ring: bytes a second that a chip sends over the two links of one torus
    axis, both directions together.
    """

    name: str
    hbm: float
    flops: float
    bandwidth: float
    ring: float


# From the vendor's system pages; `hbm` is what the compiler allows a program.
CHIPS = {
    "v4": Chip("TPU v4", 30.75 * GIB, 275e12, 1228e9, 90e9),
    "v5e": Chip("TPU v5e", 15.75 * GIB, 197e12, 819e9, 90e9),
    "v5p": Chip("TPU v5p", 95.0 * GIB, 459e12, 2765e9, 180e9),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 918e12, 1640e9, 180e9),
}

# The compiler wants to know these; nothing is looked up on the network.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # the lock is for processes that use chips; this one uses none
}


def topology(name: str) -> tuple[Chip, Sequence[jax.Device]]:
    """(chip, devices) of a topology such as `v5e:16x16` or `v5p:4x4x4`; the devices only compile.

    Raises UserError on a name that is no topology, or when libtpu is not installed.
    """
    kind, _, layout = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", layout):
        known = ", ".join(CHIPS)
        raise UserError(f"--topology={name}: write CHIP:AxB[xC], CHIP one of {known}, as in v5e:16x16")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name}: the TPU compiler is not installed; pip install libtpu")
    from jax.experimental import topologies

    with _environment():
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--topology={name}: {reason}") from error
    chips = math.prod(int(size) for size in layout.split("x"))
    if len(found.devices) != chips:
        raise UserError(f"--topology={name}: {len(found.devices)} devices on {chips} chips is not supported")
    return CHIPS[kind], found.devices


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What libtpu reads while it loads; settings of the user's own stay."""
    added = [key for key in _ENVIRONMENT if key not in os.environ]
    os.environ.update({key: _ENVIRONMENT[key] for key in added})
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def seconds_on_wire(item: Collective, chip: Chip) -> float:
    """Time of all executions of a collective as a ring over one torus axis.

    Gathers, scatters and exchanges pass (n-1)/n of the larger side, a reduction twice that. A group
    laid out over two axes can be faster, one without wrap-around slower.
    """
    share = (item.group - 1) / item.group
    volume = item.bytes * item.times
    if item.kind == "collective-permute":
        return volume / (chip.ring / 2)  # one neighbour, one direction
    if item.kind == "all-to-all":
        return volume * share / 4 / (chip.ring / 2)
    return volume * share * (2 if item.kind == "all-reduce" else 1) / chip.ring
