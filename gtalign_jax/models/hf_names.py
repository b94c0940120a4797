"""The one table between our parameters and the tensors of a Hugging Face checkpoint."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gtalign_jax.models import transformer
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.types import PyTree

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
    """One stored tensor: its file name, and which of our axes each of its axes is made of.

    A query kernel, held [D, heads, head_dim] and stored [heads * head_dim, D], has axes ((1, 2), (0,)).
    """

    name: str
    axes: tuple[tuple[int, ...], ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Our axes in the order they are stored in."""
        return tuple(itertools.chain(*self.axes))

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(math.prod(shape[axis] for axis in group) for group in self.axes)

    def to_stored(self, ours: np.ndarray) -> np.ndarray:
        return ours.transpose(self.order).reshape(self.stored_shape(ours.shape))

    def to_ours(self, stored: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """From the stored layout; shape: ours."""
        return stored.reshape([shape[axis] for axis in self.order]).transpose(np.argsort(self.order))


def name_table(config: ModelConfig) -> PyTree:
    """A tree like the parameters: an `Entry`, or a tuple of one per layer for stacked leaves."""

    def entry(path: tuple, leaf: Any) -> Entry | tuple[Entry, ...]:
        keys = tuple(part.key for part in path)
        if keys[0] != "layers":
            return Entry(_TOP_NAMES[keys], tuple((axis,) for axis in range(leaf.ndim)))
        axes = tuple(range(leaf.ndim - 1))
        groups: tuple[tuple[int, ...], ...] = (axes,)  # of scales and biases, whose heads are flattened
        if keys[-1] == "kernel":
            inputs = 2 if keys[1] == "output" else 1
            groups = (axes[inputs:], axes[:inputs])
        return tuple(
            Entry(f"model.layers.{i}.{_LAYER_NAMES[keys[1:]]}", groups) for i in range(leaf.shape[0])
        )

    return jax.tree.map_with_path(entry, abstract_params(config))


def abstract_params(config: ModelConfig) -> PyTree:
    """Shapes and dtypes of the parameters, nothing allocated."""
    return jax.eval_shape(lambda: transformer.init_params(jax.random.key(0), config))


def is_entry(x: Any) -> bool:
    """Whether x is a leaf of the table."""
    return isinstance(x, Entry) or (isinstance(x, tuple) and isinstance(x[0], Entry))


def flat_entries(table: PyTree, tree: PyTree) -> list[tuple[Entry, Any, int | None]]:
    """(entry, leaf of a like tree, layer or None) for every stored tensor, sorted by name."""
    entries, structure = jax.tree.flatten(table, is_leaf=is_entry)
    flat: list[tuple[Entry, Any, int | None]] = []
    for entry, leaf in zip(entries, structure.flatten_up_to(tree), strict=True):
        if isinstance(entry, Entry):
            flat.append((entry, leaf, None))
        else:
            flat += [(item, leaf, i) for i, item in enumerate(entry)]
    return sorted(flat, key=lambda row: row[0].name)
