"""Hugging Face folders in and out: one name table, safetensors only.

Import streams: a host reads the slices that its devices hold, one device's part of one (stacked) leaf at
a time, so it never holds more than that above the model. Export streams too, one stored tensor at a time;
it is atomic and byte-deterministic. On several hosts every process calls both: each reads its own
slices, and process 0 writes while the others help to gather.
"""

import collections
import functools
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from gtalign_jax.errors import UserError
from gtalign_jax.files import drafts, paths
from gtalign_jax.files.drafts import Draft
from gtalign_jax.mesh import processes
from gtalign_jax.models import stored
from gtalign_jax.models.config import ModelConfig, to_hf
from gtalign_jax.models.folders import kept
from gtalign_jax.models.hf_names import Entry, abstract_params, flat_entries, is_entry, name_table
from gtalign_jax.models.stored import INDEX, Tensor
from gtalign_jax.types import PyTree

# A stored tensor, the leaf that it is of, and its layer there or None.
Row = tuple[Entry, jax.Array, int | None]
HEAD = "lm_head.weight"


def resolve_folder(model: str) -> pathlib.Path:
    """A model folder, or a hub name fetched as safetensors and JSON only (never pickles)."""
    folder = paths.path(model)
    with drafts.naming_store(folder):
        if folder.is_dir():
            return folder
    if folder.suffix == ".gguf" and folder.is_file():
        raise UserError(
            f"{model}: a GGUF file; python -m experiments.fetch_model {model} --out=DIR makes a folder"
        )
    if model.count("/") != 1 or model.startswith((".", "/")):
        raise UserError(f"{model}: no such model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
    try:
        return paths.path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{model}: not a local folder and not to be had from the hub ({error})") from error


def load_params(
    folder: pathlib.Path,
    config: ModelConfig,
    shardings: PyTree | None = None,
    loaded: Callable[[int], None] = lambda count: None,
) -> PyTree:
    """Parameters of an HF folder in `config.runtime.param_dtype`, laid out by `shardings` (a like tree).

    Without shardings they go to the first device of this process. loaded: told how many arrays are there,
    of those of `abstract_params`, after each. Raises UserError naming a missing,
    superfluous, misshapen or damaged tensor or file, before anything is put on a device, and one that holds a
    number that is not finite; on several processes all raise what one of them found.
    """
    tensors = processes.on_each(lambda: stored.read_headers(paths.path(folder)))
    table, shapes = name_table(config), abstract_params(config)
    _check_tensors(table, shapes, tensors, config)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    count = itertools.count(1)

    def load(*leaf: Any) -> jax.Array:
        array = _load_leaf(tensors, *leaf)
        loaded(next(count))
        return array

    return processes.on_each(lambda: jax.tree.map(load, table, shapes, shardings, is_leaf=is_entry))


def _load_leaf(
    tensors: Mapping[str, Tensor],
    entry: Entry | tuple[Entry, ...],
    leaf: jax.ShapeDtypeStruct,
    sharding: Sharding,
) -> jax.Array:
    """One parameter on the devices of this host."""
    arrays = []
    held = sharding.addressable_devices_indices_map(leaf.shape)
    for part, devices in read_parts(entry, leaf, held, tensors):
        # Waited for, so that the host's copy is gone before the next one is read.
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in devices])
        del part
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def read_parts(
    entry: Entry | tuple[Entry, ...],
    leaf: jax.ShapeDtypeStruct,
    held: Mapping[jax.Device, tuple[slice, ...] | None],
    tensors: Mapping[str, Tensor],
) -> Iterator[tuple[np.ndarray, list[jax.Device]]]:
    """Each distinct part of a leaf that devices hold, read once, with the devices that hold it."""
    holders = collections.defaultdict(list)
    for device, index in held.items():
        assert index is not None  # each holds a part
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        holders[bounds].append(device)
    for bounds, devices in holders.items():
        yield _read_part(entry, leaf, bounds, tensors), devices


def _read_part(
    entry: Entry | tuple[Entry, ...],
    leaf: jax.ShapeDtypeStruct,
    bounds: tuple[tuple[int, int], ...],
    tensors: Mapping[str, Tensor],
) -> np.ndarray:
    """The part [begin, end) of every axis of a leaf, read layer by layer into one buffer."""
    out = _aligned_empty([end - begin for begin, end in bounds], leaf.dtype)
    if isinstance(entry, Entry):
        out[...] = _read_entry(entry, leaf.shape, bounds, tensors)
        return out
    for place, layer in enumerate(range(*bounds[0])):
        out[place] = _read_entry(entry[layer], leaf.shape[1:], bounds[1:], tensors)
    return out


def _read_entry(
    entry: Entry, shape: Sequence[int], bounds: Sequence[tuple[int, int]], tensors: Mapping[str, Tensor]
) -> np.ndarray:
    """The part of one stored tensor that is [begin, end) of each of our axes, in our layout."""
    index, held = [], [end - begin for begin, end in bounds]
    for first, *rest in entry.axes:
        # A stored axis is cut along the first of ours; the others are read whole and cut in memory.
        size = math.prod(shape[axis] for axis in rest)
        index.append(slice(bounds[first][0] * size, bounds[first][1] * size))
        for axis in rest:
            held[axis] = shape[axis]
    ours = entry.to_ours(stored.read_slice(tensors[entry.name], tuple(index)), held)
    inner = {axis for _, *rest in entry.axes for axis in rest}
    return ours[tuple(slice(*bounds[a]) if a in inner else slice(None) for a in range(len(bounds)))]


def _aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which a CPU device takes over without a copy."""
    dtype = jnp.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _check_tensors(table: PyTree, shapes: PyTree, tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Every tensor the model has is there in its shape, and no other is."""
    flat = flat_entries(table, shapes)
    wanted = {entry.name for entry, _, _ in flat}
    missing = sorted(wanted - set(tensors))
    if missing:
        raise UserError(f"tensor {missing[0]} is missing from the checkpoint ({len(missing)} in all)")
    harmless = {HEAD} if config.tie_embeddings else set()
    extra = sorted(n for n in set(tensors) - wanted - harmless if not n.endswith("rotary_emb.inv_freq"))
    if extra:
        raise UserError(f"tensor {extra[0]} is in the checkpoint but not in a {config.family} model")
    for entry, leaf, layer in flat:
        shape = leaf.shape if layer is None else leaf.shape[1:]
        stored.check(tensors[entry.name], entry.stored_shape(shape))


def save_params(
    params: PyTree,
    config: ModelConfig,
    folder: pathlib.Path,
    *,
    tokenizer: Any = None,
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 4 * 2**30,
    dtype: str | None = None,
    tied_head: bool = False,
) -> None:
    """Write an HF folder atomically: safetensors shards and index, configs, and the tokenizer's files.

    The folder appears (or is replaced) only when everything in it is written. dtype: `float32`,
    `bfloat16`, ...; by default what the config.json that the model was read from says, else the
    parameters' own. tied_head: write tied embeddings a second time as `lm_head.weight`, for servers that keep
    a head of their own. Other files of an older model's folder stay in it; UserError for a folder that holds
    something and no model. On several processes all must call this; it returns when the folder is there.
    """
    folder = paths.absolute(folder)
    fields, dtype = _config_fields(params, config, dtype)
    stored.dtype_name(dtype)
    rows = flat_entries(name_table(config), params)
    if tied_head and config.tie_embeddings:
        rows = [(Entry(HEAD, ((0,), (1,))), params["embedding"], None), *rows]
    keeps = processes.from_main(functools.partial(kept, folder))
    if jax.process_index() == 0:
        size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) * jnp.dtype(dtype).itemsize
        with drafts.folder(folder, keeps, size) as draft:
            _write_shards(rows, draft, max_shard_bytes, dtype)
            _write_json(draft.folder / "config.json", fields)
            _write_json(draft.folder / "generation_config.json", dict(generation or {}))
            if tokenizer is not None:
                tokenizer.save_pretrained(draft.folder)
    else:
        _write_shards(rows, None, max_shard_bytes, dtype)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder.name}")


def _config_fields(params: PyTree, config: ModelConfig, dtype: str | None) -> tuple[dict[str, Any], str]:
    """(fields of config.json, type to store in)."""
    fields = to_hf(config)
    key = "torch_dtype" if "torch_dtype" in fields and "dtype" not in fields else "dtype"
    held = str(jax.tree.leaves(params)[0].dtype)
    dtype = dtype or (config.source and fields.get(key)) or held
    return fields | {key: dtype}, dtype


def _write_shards(rows: Sequence[Row], draft: Draft | None, limit: int, dtype: str) -> None:
    """Fill the draft with shards of at most `limit` bytes; without one, only help to gather."""
    shards = _split(rows, limit, jnp.dtype(dtype).itemsize)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = stored.SINGLE
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shapes = {entry.name: entry.stored_shape(_shape(leaf, layer)) for entry, leaf, layer in shard}
        arrays = _gathered(shard, dtype)
        if draft is None:
            collections.deque(arrays, maxlen=0)  # run through to the end
            continue
        total += stored.write_file(draft.folder / name, shapes, dtype, arrays)
        draft.pass_on(name)
        weight_map |= dict.fromkeys(shapes, name)
    if draft is not None and len(shards) > 1:
        _write_json(draft.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _split(flat: Sequence[Row], limit: int, itemsize: int) -> list[list[Row]]:
    """Tensors in name order, as many to a shard as fit."""
    shards: list[list[Row]] = [[]]
    size = 0
    for row in flat:
        nbytes = math.prod(_shape(*row[1:])) * itemsize
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += nbytes
    return shards


def _shape(leaf: jax.Array, layer: int | None) -> tuple[int, ...]:
    return leaf.shape if layer is None else leaf.shape[1:]


def _gathered(shard: Sequence[Row], dtype: str) -> Iterator[np.ndarray]:
    """The shard's tensors one after the other, as they are stored."""
    for entry, leaf, layer in shard:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            assert isinstance(leaf.sharding, NamedSharding)  # split over the mesh
            ours = _replicate(leaf.sharding.mesh)(leaf, layer)
        else:
            ours = leaf if layer is None else leaf[layer]
        yield entry.to_stored(np.asarray(ours)).astype(dtype, copy=False)


@functools.lru_cache(maxsize=4)
def _replicate(mesh: Mesh) -> Any:
    """(leaf, layer or None) → the layer's array on every device of the mesh."""

    def pick(x: jax.Array, i: int | None) -> jax.Array:
        return x if i is None else jax.lax.dynamic_index_in_dim(x, i, keepdims=False)

    return jax.jit(pick, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
