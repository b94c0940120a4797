"""Hugging Face folders in and out: one name table, safetensors only.

Import streams: each device shard is read as slices of the files, so a host never holds more than one
(stacked) tensor above the model and never reads what its devices do not need. Export is atomic and
byte-deterministic.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.flax import save_file

from gtalign_jax.errors import UserError
from gtalign_jax.models import transformer
from gtalign_jax.models.config import ModelConfig, to_hf
from gtalign_jax.types import PyTree

INDEX = "model.safetensors.index.json"

# Our leaf under params["layers"] → the tensor's name inside `model.layers.N.`.
_LAYER_NAMES = {
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("query_norm", "scale"): "self_attn.q_norm.weight",
    ("key_norm", "scale"): "self_attn.k_norm.weight",
} | {
    (ours, leaf): f"{theirs}.{'weight' if leaf == 'kernel' else 'bias'}"
    for ours, theirs in {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "output": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }.items()
    for leaf in ("kernel", "bias")
}
_TOP_NAMES = {
    ("embedding",): "model.embed_tokens.weight",
    ("unembedding",): "lm_head.weight",
    ("final_norm", "scale"): "model.norm.weight",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored tensor: its file name, and how many leading axes of ours are its inputs.

    A projection is stored [outputs, inputs] with heads flattened, and held as [inputs..., outputs...];
    inputs is 0 for tensors stored as they are held.
    """

    name: str
    inputs: int

    def to_stored(self, ours: np.ndarray) -> np.ndarray:
        if not self.inputs:
            return ours.reshape(-1) if self.name.endswith("bias") else ours
        rows = int(np.prod(ours.shape[: self.inputs]))
        return ours.reshape(rows, -1).T

    def to_ours(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return (stored.T if self.inputs else stored).reshape(shape)


def name_table(config: ModelConfig) -> PyTree:
    """A tree like the parameters: an `Entry`, or a tuple of one per layer for stacked leaves."""

    def entry(path: tuple, leaf: Any) -> Entry | tuple[Entry, ...]:
        keys = tuple(part.key for part in path)
        if keys[0] != "layers":
            return Entry(_TOP_NAMES[keys], 0)
        name = _LAYER_NAMES[keys[1:]]
        inputs = 0 if keys[-1] != "kernel" else 2 if keys[1] == "output" else 1
        return tuple(Entry(f"model.layers.{i}.{name}", inputs) for i in range(leaf.shape[0]))

    return jax.tree.map_with_path(entry, abstract_params(config))


def abstract_params(config: ModelConfig) -> PyTree:
    """Shapes and dtypes of the parameters, nothing allocated."""
    return jax.eval_shape(lambda: transformer.init_params(jax.random.key(0), config))


def resolve_folder(model: str) -> pathlib.Path:
    """A local model folder, or a hub name fetched as safetensors and JSON only (never pickles)."""
    folder = pathlib.Path(model)
    if folder.is_dir():
        return folder
    if model.count("/") != 1 or model.startswith((".", "/")):
        raise UserError(f"{model}: no such model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
    try:
        return pathlib.Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{model}: not a local folder and not to be had from the hub ({error})") from error


def load_params(folder: pathlib.Path, config: ModelConfig, shardings: PyTree | None = None) -> PyTree:
    """Parameters of an HF folder in `config.param_dtype`, laid out by `shardings` (a like tree).

    Raises UserError naming a missing, superfluous or misshapen tensor.
    """
    where = _tensor_files(pathlib.Path(folder))
    table, shapes = name_table(config), abstract_params(config)
    is_entry = lambda x: isinstance(x, Entry) or (isinstance(x, tuple) and isinstance(x[0], Entry))
    entries = jax.tree.leaves(table, is_leaf=is_entry)
    _check_names(entries, where, config)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)

    def load(entry, leaf, sharding):
        read = _reader(entry, leaf, where)
        return jax.make_array_from_callback(leaf.shape, sharding, read)

    return jax.tree.map(load, table, shapes, shardings, is_leaf=is_entry)


def _reader(
    entry: Entry | tuple[Entry, ...], leaf: jax.ShapeDtypeStruct, where: Mapping[str, pathlib.Path]
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Reads the slice of one leaf that a device holds, layer by layer."""

    def one(item: Entry, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        with safe_open(where[item.name], framework="flax") as file:
            stored = np.asarray(file.get_tensor(item.name))
        if stored.size != int(np.prod(shape)):
            raise UserError(f"{where[item.name]}: {item.name} has shape {stored.shape}, config says {shape}")
        return item.to_ours(stored, shape)[index].astype(leaf.dtype)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if isinstance(entry, Entry):
            return one(entry, index, leaf.shape)
        chosen = range(*index[0].indices(len(entry)))
        return np.stack([one(entry[i], index[1:], leaf.shape[1:]) for i in chosen])

    return read


def _tensor_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Tensor name → file, from the index or the single file."""
    index = folder / INDEX
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in names.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise UserError(f"{folder}: neither model.safetensors nor {INDEX}; other formats are not read")
    with safe_open(single, framework="numpy") as file:
        return dict.fromkeys(file.keys(), single)


def _check_names(entries: list, where: Mapping[str, pathlib.Path], config: ModelConfig) -> None:
    wanted = {e.name for entry in entries for e in ((entry,) if isinstance(entry, Entry) else entry)}
    missing = sorted(wanted - set(where))
    if missing:
        raise UserError(f"tensor {missing[0]} is missing from the checkpoint ({len(missing)} in all)")
    harmless = {"lm_head.weight"} if config.tie_embeddings else set()
    extra = sorted(n for n in set(where) - wanted - harmless if not n.endswith("rotary_emb.inv_freq"))
    if extra:
        raise UserError(f"tensor {extra[0]} is in the checkpoint but not in a {config.family} model")


def save_params(
    params: PyTree,
    config: ModelConfig,
    folder: pathlib.Path,
    *,
    tokenizer: Any = None,
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Write an HF folder atomically: safetensors shards and index, configs, and the tokenizer's files.

    The folder appears (or is replaced) only when everything in it is written.
    """
    folder = pathlib.Path(folder).absolute()
    draft = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    _write_shards(params, config, draft, max_shard_bytes)
    _write_json(draft / "config.json", to_hf(config))
    _write_json(draft / "generation_config.json", dict(generation or {}))
    if tokenizer is not None:
        tokenizer.save_pretrained(draft)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)


def _write_shards(params: PyTree, config: ModelConfig, folder: pathlib.Path, limit: int) -> None:
    stored = _flat_entries(params, config)
    shards, size = [[]], 0
    for item, leaf, layer in stored:
        nbytes = leaf.nbytes // (1 if layer is None else leaf.shape[0])
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append((item, leaf, layer))
        size += nbytes
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {item.name: _fetch(item, leaf, layer) for item, leaf, layer in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _flat_entries(params: PyTree, config: ModelConfig) -> list[tuple[Entry, jax.Array, int | None]]:
    """(entry, leaf, layer) for every stored tensor, sorted by name."""
    is_entry = lambda x: isinstance(x, Entry) or (isinstance(x, tuple) and isinstance(x[0], Entry))
    entries, structure = jax.tree.flatten(name_table(config), is_leaf=is_entry)
    flat = []
    for entry, leaf in zip(entries, structure.flatten_up_to(params), strict=True):
        if isinstance(entry, Entry):
            flat.append((entry, leaf, None))
        else:
            flat += [(item, leaf, i) for i, item in enumerate(entry)]
    return sorted(flat, key=lambda row: row[0].name)


def _fetch(item: Entry, leaf: jax.Array, layer: int | None) -> jax.Array:
    ours = np.asarray(leaf if layer is None else leaf[layer])
    return jnp.asarray(np.ascontiguousarray(item.to_stored(ours)))


def _write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
