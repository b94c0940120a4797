"""Low-rank adapters: a projection W learns as W + (alpha / rank) A B while W itself never changes.

    y = x W + (alpha / rank) (x A) B,    A [inputs..., r],  B [r, outputs...],  B = 0 at the start

Three leaves stand beside a target's `kernel` in the one parameter tree that every pass takes: `lora_a`,
`lora_b` and the constant `lora_scale`. `split` takes what is trained out of that tree and `join` puts it
back; both only rearrange dictionaries, so the base weights are neither copied nor merged in training. A
tree without adapters is trained whole, and its base is None.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gtalign_jax.errors import INF, MAX_COUNT, in_range
from gtalign_jax.models import hf_names, transformer
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.types import Array

Params = dict[str, Any]
TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
TRAINED = ("lora_a", "lora_b")
RANK = "width"  # the sharding table's name of an axis that is never split


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """rank: of the adapters (0: none, every parameter is trained). alpha: an adapter counts alpha / rank.

    targets: the projections of every layer that get one, of query, key, value, output, gate, up and down.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank={self.rank}: must be 0 (no adapters) or more")
        if self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha}: must be positive")
        in_range(self, rank=(0, MAX_COUNT), alpha=(0, INF))
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets={self.targets}: name one projection or more, each once")
        for name in self.targets:
            if name not in TARGETS:
                raise ValueError(f"targets: {name!r} is not one of {', '.join(TARGETS)}")


def init_adapters(key: Array, model: ModelConfig, config: LoraConfig) -> Params:
    """Adapters of a model for `join`, in float32 whatever the base is stored in.

    {"layers": {target: {lora_a [L, inputs..., r], lora_b [L, r, outputs...], lora_scale [L]}}}; A is uniform
    in +-1 / sqrt(number of inputs), as in PEFT, and B is zero: the model starts as its base. Empty at rank 0.
    """
    layers = {}
    for number, (name, (inputs, outputs)) in enumerate(_shapes(model, config).items()):
        count, bound = model.num_layers, 1.0 / math.sqrt(math.prod(inputs))
        shape = (count, *inputs, config.rank)
        layers[name] = {
            "lora_a": jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -bound, bound),
            "lora_b": jnp.zeros((count, config.rank, *outputs), jnp.float32),
            "lora_scale": jnp.full((count,), config.alpha / config.rank, jnp.float32),
        }
    return {"layers": layers}


def adapter_axes(model: ModelConfig, config: LoraConfig) -> Params:
    """The logical axis names of `init_adapters`: those of the kernel, the rank never split."""
    axes, layers = transformer.logical_axes(model)["layers"], {}
    for name, (inputs, _) in _shapes(model, config).items():
        names = axes[name]["kernel"][1:]
        layers[name] = {
            "lora_a": ("layers", *names[: len(inputs)], RANK),
            "lora_b": ("layers", RANK, *names[len(inputs) :]),
            "lora_scale": ("layers",),
        }
    return {"layers": layers}


def abstract_params(model: ModelConfig, config: LoraConfig) -> Params:
    """Shapes of a model's parameters with its adapters, nothing allocated."""
    adapters = jax.eval_shape(lambda: init_adapters(jax.random.key(0), model, config))
    return join(hf_names.abstract_params(model), adapters)


def logical_axes(model: ModelConfig, config: LoraConfig) -> Params:
    """Axis names like `abstract_params`."""
    return join(transformer.logical_axes(model), adapter_axes(model, config))


def _shapes(model: ModelConfig, config: LoraConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Target → (shape of its inputs, shape of its outputs)."""
    if not config.rank:
        return {}
    shapes, table = hf_names.abstract_params(model)["layers"], hf_names.name_table(model)["layers"]
    parts = {}
    for name in config.targets:
        outputs, inputs = table[name]["kernel"][0].axes  # as stored: the outputs come first
        kernel = shapes[name]["kernel"].shape[1:]
        inner, outer = (tuple(kernel[axis] for axis in axes) for axes in (inputs, outputs))
        parts[name] = (inner, outer)
    return parts


def join(base: Params | None, trained: Any) -> Any:
    """`trained` laid over `base`, dictionary by dictionary; no array is touched. Without a base: trained."""
    if base is None or not isinstance(trained, dict):
        return trained
    return base | {name: join(base.get(name), part) for name, part in trained.items()}


def split(params: Params) -> tuple[Params, Params | None]:
    """(what is trained, its base), which `join` puts together again: the adapters, or all and None."""
    found = {
        name: {leaf: part[leaf] for leaf in TRAINED}
        for name, part in params["layers"].items()
        if TRAINED[0] in part
    }
    if not found:
        return params, None
    layers = {
        name: {leaf: x for leaf, x in part.items() if leaf not in TRAINED}
        for name, part in params["layers"].items()
    }
    return {"layers": found}, params | {"layers": layers}


def value_base(base: Params | None) -> Params | None:
    """What a value model's adapters and head stand on (`models.heads`)."""
    return None if base is None else {"trunk": base}


def merged(params: Params) -> Params:
    """The parameters of the same function without adapters: kernels W + (alpha / rank) A B in W's type.

    A kernel is a `MergedKernel`, which the export reads a layer at a time, so that no second copy of the
    model is ever held. In bfloat16 the sum is rounded; the adapters themselves are not.
    """
    layers = dict(params["layers"])
    for name, part in layers.items():
        if TRAINED[0] in part:
            kept = {leaf: x for leaf, x in part.items() if not leaf.startswith("lora_")}
            layers[name] = kept | {"kernel": MergedKernel(part)}
    return params | {"layers": layers}


@dataclasses.dataclass(frozen=True, eq=False)
class MergedKernel:
    """A stacked kernel with its adapter added, computed when a layer of it is read.

    part: the projection's leaves. On several processes all must read the same layers.
    """

    part: Params

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part["kernel"].shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.part["kernel"].dtype

    def __getitem__(self, layer: int) -> Array:
        kernel, whole = self.part["kernel"], None
        if isinstance(kernel, jax.Array) and not kernel.is_fully_addressable:
            assert isinstance(kernel.sharding, NamedSharding)  # split over the mesh
            whole = NamedSharding(kernel.sharding.mesh, PartitionSpec())
        return _merge_layer(whole)(kernel, *(self.part[name] for name in (*TRAINED, "lora_scale")), layer)


@functools.lru_cache(maxsize=4)
def _merge_layer(out: NamedSharding | None) -> Callable[..., Array]:
    """(kernel, a, b, scale, layer) → that layer of kernel + scale a b, summed in float32."""

    def merge(kernel: Array, a: Array, b: Array, scale: Array, layer: Array) -> Array:
        own, a, b, scale = (
            jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (kernel, a, b, scale)
        )
        added = scale * jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
        return (own.astype(jnp.float32) + added).astype(kernel.dtype)

    return jax.jit(merge, out_shardings=out)
