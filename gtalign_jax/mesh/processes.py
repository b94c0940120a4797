"""Several processes as one run: the few things that they must agree on. `cluster` has them find each other.

Every process runs the same program. Arrays on the mesh are global; what lives on a host (texts, verdicts,
files) is divided by `part` or by `host_rows` and brought together again by the gathers below. With one
process every function here is the identity and costs nothing.
"""

import pickle
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gtalign_jax.errors import UserError
from gtalign_jax.mesh.sharding import RULES

PyTree = Any


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
    return np.unique(np.concatenate([np.arange(count)[index] for index in held]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays [P, ...] with their first axis split as batches are."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


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

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # of devices that hold a part
            begin, end, _ = index[0].indices(count)
            first = np.searchsorted(rows, begin)
            return leaf[first : first + end - begin]

        return jax.make_array_from_callback((count, *leaf.shape[1:]), sharding, read)

    return jax.tree.map(place, local)


def fetch(tree: PyTree) -> PyTree:
    """NumPy arrays of every leaf, whole, on every process (a collective: all must call it)."""

    def whole(x: Any) -> bool:
        return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated

    if all(whole(leaf) for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: jax.device_get(x) if whole(x) else multihost_utils.process_allgather(x, tiled=True), tree
    )


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
    value, failure = all_gather(answer)[0]
    if failure is not None:
        raise failure
    return value


def on_each(make: Callable[[], Any]) -> Any:
    """What `make` returns on this process; every process calls it. An exception on one is raised on all."""
    if jax.process_count() == 1:
        return make()
    value, failure = None, None
    try:
        value = make()
    except Exception as error:  # passed on, as in `from_main`
        failure = error
    failures = [error for error in all_gather(failure) if error is not None]
    if failures:
        raise failures[0]
    return value


def exchanged(make: Callable[[], Any]) -> list[Any]:
    """What `make` returns on each process, in their order, on every process; as `on_each` for exceptions."""
    return all_gather(on_each(make))


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
