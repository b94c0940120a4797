"""Sharding as one table: logical axis names to mesh axes.

Parameters and activations name their axes by meaning (`embed`, `heads`, `batch`, ...); `RULES` says
which mesh axes each name is split over. Nothing else knows the mesh. Four mesh axes:

    data     copies of the model: the batch is split, gradients are summed. Crosses slices (DCN).
    fsdp     the batch is split and so are the parameters; a layer's weights are gathered when used.
    tensor   heads, MLP and vocabulary are split.
    context  the sequence is split; keys and values are gathered. Parameters are split over it too.

Models call `constrain`, which reads the mesh that `jax.set_mesh` made current. Without one, or on one
device, it does nothing; a jitted function is retraced when the current mesh changes.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gtalign_jax.errors import MAX_COUNT, UserError, in_range, within

PyTree = Any
MESH_AXES = ("data", "fsdp", "tensor", "context")
CONSTANTS = ("ns_coeffs",)  # three numbers that optax's Muon keeps in its state

RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    # activations
    "batch": ("data", "fsdp"),
    "group": ("data", "fsdp"),  # samples of a prompt take what a small batch of prompts left over
    "length": ("context",),
    "shards": ("data", "fsdp", "context"),  # tokens regrouped by the device that holds them
    "keys": (),  # slots that every query of the row reads
    "width": (),
}

# While a token a row is decoded there is no sequence to split: rows take the context axis as well, and
# weights that stay whole over the batch axes are read in every step but gathered once.
_ROWS = ("data", "fsdp", "context")
DECODE_RULES = RULES | {"embed": (), "batch": _ROWS, "group": _ROWS}

_rules: contextvars.ContextVar[dict[str, tuple[str, ...]]] = contextvars.ContextVar("rules", default=RULES)

# K/V heads may be fewer than the tensor axis is wide; then every device of the axis holds them all.
MAY_REPLICATE = frozenset({"kv"})


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes inside one slice; -1 on one axis takes the devices that are left.

    slices: TPU slices (or GPU nodes) joined by the data-centre network. Each holds whole copies of the
    parameters, so that only the gradient sum crosses the slow network; the data axis is slices * data.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    slices: int = 1

    def __post_init__(self) -> None:
        for name in MESH_AXES:
            if (size := getattr(self, name)) < 1 and size != -1:
                raise ValueError(f"{name}={size}: must be at least 1, or -1 for the devices that are left")
            within(self, -1, MAX_COUNT, name)
        rest = [name for name in MESH_AXES if getattr(self, name) == -1]
        if len(rest) > 1:
            raise ValueError(f"{rest[1]}=-1: at most one of {', '.join(MESH_AXES)} is -1, and {rest[0]} is")
        if self.slices < 1:
            raise ValueError(f"slices={self.slices}: must be at least 1")
        in_range(self, slices=(1, MAX_COUNT))

    def shape(self, devices: int) -> tuple[int, int, int, int]:
        """Axis sizes inside a slice for so many devices in all. Raises UserError if they do not fit."""
        sizes = [self.data, self.fsdp, self.tensor, self.context]
        if -1 in sizes:
            known = self.slices * math.prod(size for size in sizes if size != -1)
            if devices % known:
                raise UserError(f"config.mesh: {known} does not divide the {devices} devices")
            sizes[sizes.index(-1)] = devices // known
        needed = math.prod(sizes) * self.slices
        if needed > devices:
            raise UserError(f"config.mesh: needs {needed} devices, {devices} are here")
        data, fsdp, tensor, context = sizes
        return data, fsdp, tensor, context


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a config over the first devices that it needs (default: of all, some of every process)."""
    every = jax.devices() if devices is None else list(devices)
    shape = config.shape(len(every))
    if devices is None:
        _check_processes(config.slices * math.prod(shape), every)
    types = (AxisType.Auto,) * len(MESH_AXES)
    if config.slices == 1:
        return jax.make_mesh(shape, MESH_AXES, types, devices=every[: math.prod(shape)])
    return Mesh(_across_slices(shape, config.slices, every), MESH_AXES, axis_types=types)


def _check_processes(size: int, devices: Sequence[jax.Device]) -> None:
    """UserError where the first `size` devices leave a process without any."""
    idle = {d.process_index for d in devices} - {d.process_index for d in devices[:size]}
    if idle:
        raise UserError(
            f"config.mesh takes {size} of {len(devices)} devices, none of process {min(idle)}; "
            "set an axis to -1, such as config.mesh.fsdp=-1"
        )


def _across_slices(shape: tuple[int, ...], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices as an array [slices * data, fsdp, tensor, context]: fast axes stay inside a slice."""
    by_slice = len({getattr(device, "slice_index", None) for device in devices}) == slices
    by_process = len({device.process_index for device in devices}) == slices
    if not (by_slice or by_process):
        raise UserError(f"config.mesh.slices={slices}: the devices form neither so many slices nor processes")
    return mesh_utils.create_hybrid_device_mesh(
        shape, (slices, 1, 1, 1), devices, process_is_granule=not by_slice
    )


def partition_spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """How an array with these logical axes is split over the mesh.

    A dimension takes the mesh axes of its rule that no earlier dimension took and that divide it; what
    does not divide stays whole. None leaves a dimension to the compiler. Raises UserError on a name
    that is not in the table.
    """
    if len(names) != len(shape):
        raise ValueError(f"{len(names)} axis names {tuple(names)} for an array of shape {tuple(shape)}")
    free = _auto_axes(mesh)
    entries: list[Any] = []
    for name, size in zip(names, shape, strict=True):
        if name is None:
            entries.append(PartitionSpec.UNCONSTRAINED)
            continue
        taken = []
        for axis in _rule(name):
            if free.get(axis, 1) > 1 and size % free[axis] == 0:
                size //= free.pop(axis)
                taken.append(axis)
        entries.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
    return PartitionSpec(*entries)


def shard_tree(axes: PyTree, mesh: Mesh, shapes: PyTree | None = None) -> PyTree:
    """NamedShardings of parameters from their logical axes (a tree of name tuples).

    shapes: a like tree of arrays or ShapeDtypeStructs. With it, a dimension that its mesh axes do not
    divide is a UserError naming the parameter, except K/V heads, which are then replicated. Without
    it, shardings are what the table says and such a dimension is refused when the array is placed.
    """
    named, structure = jax.tree.flatten_with_path(axes, is_leaf=_is_names)
    sized = [None] * len(named) if shapes is None else structure.flatten_up_to(shapes)
    shardings = []
    for (path, names), leaf in zip(named, sized, strict=True):
        if leaf is None:
            shape = [math.prod(mesh.shape.values())] * len(names)  # divisible by every axis
        else:
            shape = leaf.shape
            _check_divides(jax.tree_util.keystr(path), names, shape, mesh)
        shardings.append(NamedSharding(mesh, partition_spec(names, shape, mesh)))
    return structure.unflatten(shardings)


def _is_names(x: Any) -> bool:
    """Whether this is a leaf of a tree of axis names."""
    return isinstance(x, tuple) and all(isinstance(name, str) for name in x)


def shard_state(state: PyTree, params: PyTree, mesh: Mesh) -> PyTree:
    """NamedShardings of an optimizer state: its moments as the parameters they belong to.

    state: the state's shapes, from `jax.eval_shape`. params: the parameters' NamedShardings. A leaf
    whose path ends in a parameter's path has that parameter's sharding; scalars and CONSTANTS are replicated.
    Raises UserError for anything else, because a replicated moment costs as much as the model.
    """
    known = {path: leaf for path, leaf in jax.tree.leaves_with_path(params)}
    depths = sorted({len(path) for path in known}, reverse=True)

    def place(path: tuple, leaf: Any) -> NamedSharding:
        for depth in depths:
            if path[-depth:] in known and leaf.ndim == len(known[path[-depth:]].spec):
                return known[path[-depth:]]
        if leaf.ndim and getattr(path[-1], "name", "") not in CONSTANTS:
            name = jax.tree_util.keystr(path)
            raise UserError(f"optimizer state {name} of shape {leaf.shape} belongs to no parameter")
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map_with_path(place, state)


def spread(tree: PyTree, mesh: Mesh) -> PyTree:
    """The tree with every leaf on the mesh: leaves that are not laid out on it yet are replicated.

    For states whose large parts were made with their shardings: what remains are counters and keys,
    which a checkpoint would otherwise bring back to one device.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x: Any) -> jax.Array:
        on_mesh = isinstance(x, jax.Array) and getattr(x.sharding, "mesh", None) == mesh
        return x if on_mesh else jax.device_put(x, everywhere)

    return jax.tree.map(place, tree)


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the prompts of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def place_batch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Arrays [P, ...] with their prompts split over the mesh; `batch_shards` must divide P."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(RULES["batch"])))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """x with its axes split over the current mesh as the table says (see `partition_spec`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if math.prod(_auto_axes(mesh).values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape, mesh))


@contextlib.contextmanager
def decode_layout() -> Iterator[None]:
    """Inside, `constrain` and `partition_spec` go by DECODE_RULES; what is traced here keeps that layout."""
    before = _rules.set(DECODE_RULES)
    try:
        yield
    finally:
        _rules.reset(before)


def gather_for_decode(params: PyTree, axes: PyTree, dtype: str) -> PyTree:
    """Parameters as a decoding loop reads them: in `dtype`, split over the tensor axis alone.

    axes: their logical axis names; a leaf that has none there (an adapter's) stays as it is. Called once,
    before the loop, so that no step gathers a weight; a device then holds 1 / tensor of the model.
    """
    known = dict(jax.tree.leaves_with_path(axes, is_leaf=_is_names))

    def place(path: tuple, x: jax.Array) -> jax.Array:
        return constrain(x.astype(dtype), *known[path]) if path in known else x

    with decode_layout():
        return jax.tree.map_with_path(place, params)


def pieces(names: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
    """Into how many parts `constrain` splits each dimension of such an array on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = partition_spec(names, shape, mesh)
    axes = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
    return tuple(math.prod(mesh.shape[axis] for axis in entry) for entry in axes)


def _rule(name: str) -> tuple[str, ...]:
    rules = _rules.get()
    if name not in rules:
        raise UserError(f"logical axis {name!r} has no rule; add it to RULES in gtalign_jax/mesh/sharding.py")
    return rules[name]


def _auto_axes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Sizes of the axes that the compiler partitions (inside shard_map, the others are not ours)."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {axis: mesh.shape[axis] for axis, kind in kinds if kind == AxisType.Auto}


def _check_divides(where: str, names: Sequence[str], shape: Sequence[int], mesh: Mesh) -> None:
    for name, axis, size in _unmet(names, shape, mesh):
        if name not in MAY_REPLICATE:
            raise UserError(
                f"parameter {where}: mesh axis {axis} ({mesh.shape[axis]}) does not divide {name} ({size}); "
                f"choose a smaller {axis} axis"
            )


def _unmet(names: Sequence[str], shape: Sequence[int], mesh: Mesh) -> Iterator[tuple[str, str, int]]:
    """(name, mesh axis, size) wherever the table wants a split that the size does not allow."""
    used: set[str] = set()
    for name, size in zip(names, shape, strict=True):
        rest = size
        for axis in _rule(name):
            if axis in used or mesh.shape.get(axis, 1) == 1:
                continue
            if rest % mesh.shape[axis]:
                yield name, axis, size
                continue
            rest //= mesh.shape[axis]
            used.add(axis)
