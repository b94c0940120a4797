"""Several processes as one run: finding each other, and the few things that they must agree on.

Every process runs the same program. Arrays on the mesh are global; what lives on a host (texts, verdicts,
files) is divided by `part` or by `host_rows` and brought together again by the gathers below. With one
process every function here is the identity and costs nothing.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gtalign_jax.errors import UserError
from gtalign_jax.sharding import RULES

PyTree = Any
DEFAULT_PORT = 55527


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How this process joins the others. Empty fields are found out by JAX from the scheduler."""

    source: str
    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1


# --- start ---------------------------------------------------------------------------------------

FLAGS = {
    "coordinator": "host:port of process 0, for a run of several processes",
    "num_processes": "how many processes the run has",
    "process_id": "which of them this one is, from 0",
}


def initialize_from(flags: Mapping[str, str]) -> Cluster | None:
    """`initialize` from the texts of `FLAGS`, each "" when it was not given."""
    numbers = {}
    for name, default in (("num_processes", 0), ("process_id", -1)):
        try:
            numbers[name] = int(flags[name] or default)
        except ValueError as error:
            raise UserError(f"--{name}={flags[name]}: must be a whole number") from error
    return initialize(flags["coordinator"], **numbers)


def initialize(
    coordinator: str = "", num_processes: int = 0, process_id: int = -1, *, timeout_s: int = 300
) -> Cluster | None:
    """Join the other processes of the run; call it before anything touches a device.

    The address is taken from the arguments, else from the environment (`find_cluster`). Returns what was
    used, or None for a run of one process. CPU processes talk through gloo. Raises UserError when the
    settings do not fit together or the others do not come in time.
    """
    given = {"GTALIGN_COORDINATOR": coordinator}
    given |= {"GTALIGN_NUM_PROCESSES": str(num_processes or ""), "GTALIGN_PROCESS_ID": ""}
    if process_id >= 0:
        given["GTALIGN_PROCESS_ID"] = str(process_id)
    cluster = find_cluster({**os.environ, **{k: v for k, v in given.items() if v}})
    if cluster is None or jax.distributed.is_initialized():
        return cluster
    if cluster.process_id > 0:
        _wait_for(cluster.coordinator, timeout_s)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if cluster.coordinator:
            # JAX is not to look for a scheduler as well: under SLURM it would hide all GPUs but one.
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.num_processes,
                cluster.process_id,
                cluster_detection_method="deactivate",
                initialization_timeout=timeout_s,
            )
        else:
            jax.distributed.initialize(initialization_timeout=timeout_s)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot join the other processes at {cluster.coordinator or cluster.source} ({reason})"
        ) from error
    return cluster


def _wait_for(address: str, timeout_s: float) -> None:
    """Until process 0 listens. JAX would wait too, but ends the process without a word to the user."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise UserError(f"coordinator {address!r}: must be host:port")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process 0 does not answer at {address} ({error}); start it, or mend the address"
                ) from error
        time.sleep(0.2)


def find_cluster(env: Mapping[str, str]) -> Cluster | None:
    """The cluster an environment describes, or None; the first of these that is there counts:

    GTALIGN_COORDINATOR (host:port), GTALIGN_NUM_PROCESSES, GTALIGN_PROCESS_ID; an indexed Kubernetes job
    with JAX_COORDINATOR_ADDRESS, or torchrun's MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK; a SLURM
    step of several tasks; the hosts of a TPU pod. Raises UserError for a description with a gap.
    """
    if env.get("GTALIGN_NUM_PROCESSES", "1") != "1" and not env.get("GTALIGN_COORDINATOR"):
        raise UserError("GTALIGN_NUM_PROCESSES is set but GTALIGN_COORDINATOR (host:port) is not")
    for names in (_GTALIGN, _KUBERNETES, _TORCHRUN):
        found = _from_names(env, *names)
        if found is not None:
            return found if found.num_processes > 1 else None
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        return Cluster("SLURM")
    pod = "," in env.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in env
    return Cluster("TPU pod") if pod else None


_GTALIGN = ("GTALIGN", ("GTALIGN_COORDINATOR",), ("GTALIGN_NUM_PROCESSES",), ("GTALIGN_PROCESS_ID",))
_KUBERNETES = (
    "Kubernetes",
    ("JAX_COORDINATOR_ADDRESS",),
    ("JAX_NUM_PROCESSES", "NNODES", "WORLD_SIZE"),
    ("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX", "NODE_RANK", "RANK"),
)
_TORCHRUN = ("torchrun", ("MASTER_ADDR",), ("WORLD_SIZE",), ("RANK",))


def _from_names(
    env: Mapping[str, str], source: str, address: Sequence[str], count: Sequence[str], index: Sequence[str]
) -> Cluster | None:
    """A cluster from the first variable of each group that is set; None when there is no address."""
    pick = lambda names: next((name for name in names if env.get(name)), None)
    if pick(address) is None:
        return None
    values = {}
    for names in (count, index):
        name = pick(names)
        if name is None:
            raise UserError(f"{address[0]} is set but {names[0]} is not: set it for every process")
        if not env[name].isdigit():
            raise UserError(f"{name}={env[name]!r}: must be a whole number")
        values[names] = int(env[name])
    if values[index] >= max(values[count], 1):
        raise UserError(f"{pick(index)}={values[index]}: must be below {pick(count)}={values[count]}")
    host = env[address[0]]
    if ":" not in host:
        host += f":{env.get('MASTER_PORT') or DEFAULT_PORT}"
    return Cluster(source, host, values[count], values[index])


# --- who does what -------------------------------------------------------------------------------


def is_main() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0


def part(count: int) -> slice:
    """This process's share of `count` things: contiguous, sizes within one of each other."""
    index, hosts = jax.process_index(), jax.process_count()
    return slice(count * index // hosts, count * (index + 1) // hosts)


def host_rows(count: int, mesh: Mesh) -> np.ndarray:
    """Rows of a global batch [count, ...] that this host's devices hold, ascending (int64).

    Hosts that share rows (a tensor axis across hosts) each get them. UserError if the mesh does not
    divide the batch.
    """
    sharding = batch_sharding(mesh)
    try:
        held = sharding.addressable_devices_indices_map((count,)).values()
    except ValueError as error:
        shards = int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))
        raise UserError(f"a batch of {count} cannot be split over {shards} devices") from error
    return np.unique(np.concatenate([np.arange(count)[rows] for (rows,) in held]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays [P, ...] with their first axis split as batches are."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


# --- arrays --------------------------------------------------------------------------------------


def global_batch(local: PyTree, count: int, mesh: Mesh) -> PyTree:
    """Global arrays [count, ...] from this host's rows [len(host_rows), ...] of each leaf.

    Hosts must agree on everything but the rows: the later axes and the dtypes.
    """
    rows = host_rows(count, mesh)
    sharding = batch_sharding(mesh)

    def place(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        if len(leaf) != len(rows):
            raise ValueError(f"{len(leaf)} rows of a batch of {count}; this host holds {len(rows)}")

        def read(index: tuple[slice, ...]) -> np.ndarray:
            begin, end, _ = index[0].indices(count)
            first = np.searchsorted(rows, begin)
            return leaf[first : first + end - begin]

        return jax.make_array_from_callback((count, *leaf.shape[1:]), sharding, read)

    return jax.tree.map(place, local)


def fetch(tree: PyTree) -> PyTree:
    """NumPy arrays of every leaf, whole, on every process (a collective: all must call it)."""
    whole = lambda x: not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
    if all(whole(leaf) for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: jax.device_get(x) if whole(x) else multihost_utils.process_allgather(x, tiled=True), tree
    )


# --- agreement -----------------------------------------------------------------------------------


def all_gather(value: Any) -> list[Any]:
    """`value` of every process, in their order, on every process: any picklable Python value.

    Only what processes of one run send to each other is unpickled.
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size)).reshape(-1)
    # A few sizes only, so that a handful of programs is compiled.
    padded = np.zeros(max(1024, 1 << (int(sizes.max()) - 1).bit_length()), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_main(make: Callable[[], Any]) -> Any:
    """What `make` returns on process 0, on every process; it is called there alone.

    An exception it raises there is raised on all, so that none waits for ever.
    """
    if jax.process_count() == 1:
        return make()
    answer: tuple[Any, Exception | None] = (None, None)
    if is_main():
        try:
            answer = (make(), None)
        except Exception as error:  # passed on: it is raised again below, on every process
            answer = (None, error)
    value, error = all_gather(answer)[0]
    if error is not None:
        raise error
    return value


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return any(all_gather(bool(flag)))


def total(numbers: Mapping[str, float]) -> dict[str, float]:
    """Counts summed over the processes; a key may be missing on some."""
    summed: dict[str, float] = {}
    for mine in all_gather(dict(numbers)):
        for key, value in mine.items():
            summed[key] = summed.get(key, 0.0) + value
    return summed


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
