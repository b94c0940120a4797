"""TPU chips and topologies that need not be here: published limits, and devices to compile for."""

import collections
import contextlib
import dataclasses
import importlib.util
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
    axis, both directions together. pod: chips along each axis of the largest slice.
    """

    name: str
    hbm: float
    flops: float
    bandwidth: float
    ring: float
    pod: tuple[int, ...]


# From the vendor's system pages; `hbm` is what the compiler allows a program.
CHIPS = {
    "v4": Chip("TPU v4", 30.75 * GIB, 275e12, 1228e9, 90e9, (16, 16, 16)),
    "v5e": Chip("TPU v5e", 15.75 * GIB, 197e12, 819e9, 90e9, (16, 16)),
    "v5p": Chip("TPU v5p", 95.0 * GIB, 459e12, 2765e9, 180e9, (16, 20, 28)),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 918e12, 1640e9, 180e9, (16, 16)),
}

_OPTIONS = {"v4": {"chip_config_name": "megacore"}}  # both cores of a chip are one device

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
    if kind not in CHIPS or not re.fullmatch(r"\d{1,9}(x\d{1,9}){1,2}", layout):
        known = ", ".join(CHIPS)
        raise UserError(f"--topology={name}: write CHIP:AxB[xC], CHIP one of {known}, as in v5e:16x16")
    chip, sizes = CHIPS[kind], sorted(int(size) for size in layout.split("x"))
    # On sizes that no slice has, the compiler may end the whole process.
    if len(sizes) != len(chip.pod) or not all(1 <= n <= m for n, m in zip(sizes, chip.pod, strict=True)):
        least, most = "x".join("1" * len(chip.pod)), "x".join(map(str, chip.pod))
        raise UserError(f"--topology={name}: a slice of {chip.name} is from {least} to {most} chips")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name}: the TPU compiler is not installed; pip install libtpu")
    from jax.experimental import topologies

    jax.local_devices(backend="cpu")  # has read XLA_FLAGS from here on
    with _environment():
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **_OPTIONS.get(kind, {}))
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--topology={name}: {reason}") from error
        one = jax.sharding.SingleDeviceSharding(found.devices[0])
        jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((), int, sharding=one)).compile()  # reads its flags
    return chip, found.devices


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What libtpu reads while it loads: its own settings, of which the user's stay, and not XLA_FLAGS, which
    hold the CPU's here; a flag that it does not know would end the process."""
    before = {key: os.environ.get(key) for key in (*_ENVIRONMENT, "XLA_FLAGS")}
    os.environ.update({**_ENVIRONMENT, **{key: value for key, value in before.items() if value is not None}})
    os.environ.pop("XLA_FLAGS", None)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


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


def seconds_on_wires(found: Sequence[Collective], chip: Chip) -> float:
    """Time of all collectives of a program, one after the other.

    Only permutes in opposite directions along an axis pass at the same time: each has links of its own.
    """
    one_way: dict[int, float] = collections.defaultdict(float)
    total = 0.0
    for item in found:
        if item.kind == "collective-permute":
            one_way[item.shift] += seconds_on_wire(item, chip)
        else:
            total += seconds_on_wire(item, chip)
    return total + sum(max(one_way[n], one_way[-n]) for n in {abs(shift) for shift in one_way})
