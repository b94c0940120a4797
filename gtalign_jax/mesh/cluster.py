"""How the processes of a run find each other: flags, environment, scheduler."""

import dataclasses
import os
import socket
import time
from collections.abc import Mapping, Sequence

import jax

from gtalign_jax.errors import UserError

DEFAULT_PORT = 55527


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How this process joins the others. Empty fields are found out by JAX from the scheduler."""

    source: str
    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1


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

    def pick(names: Sequence[str]) -> str | None:
        return next((name for name in names if env.get(name)), None)

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
