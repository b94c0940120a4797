"""Which decoding runs: the one switch between layouts, so that callers do not know them.

    decode_layout = auto       features on a CPU and one device, rows everywhere else
                    rows       `transformer.decode_step`: any mesh, any parameters
                    features   `cpu.decode_step`: one device, dense parameters; faster on a CPU
                    gathered   rows, with the weights gathered over fsdp and context once before the loop, and
                               samples split over the context axis too: a device then holds 1 / tensor of
                               the model in the compute dtype, and no step waits for a weight

Parameters with more than kernels and biases (LoRA factors) always take rows. A generation prepares its
weights once (`prepare_decode`) and passes them to every step; the caches belong to the same layout.
"""

import contextlib

import jax
import jax.numpy as jnp

from gtalign_jax.mesh.sharding import constrain, decode_layout, gather_for_decode
from gtalign_jax.models import cpu, transformer
from gtalign_jax.models import extend as extension
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.cpu import FeatureWeights, RowCache
from gtalign_jax.models.layers import BATCH
from gtalign_jax.models.transformer import DecodeCache, Params, PromptCache
from gtalign_jax.types import Array


def feature_major(params: Params | FeatureWeights, config: ModelConfig) -> bool:
    """Whether these parameters decode feature-major here; read at trace time, under the mesh in use."""
    if isinstance(params, FeatureWeights):
        return True
    if config.runtime.decode_layout in ("rows", "gathered") or not _dense(params):
        return False
    return config.runtime.decode_layout == "features" or _one_cpu()


def _dense(params: Params) -> bool:
    layers = params["layers"][0] if isinstance(params["layers"], tuple) else params["layers"]
    return all(set(part) <= {"kernel", "bias", "scale"} for part in layers.values())


def _one_cpu() -> bool:
    """Whether the computation goes to a single CPU device: of the current mesh, or the default one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend() == "cpu" and mesh.size <= 1
    return mesh.size == 1 and mesh.abstract_device.device_kind == "cpu"


def prepare_decode(params: Params | FeatureWeights, config: ModelConfig) -> Params | FeatureWeights:
    """Parameters as the decode step of their layout reads them; prepared ones are returned as they are.

    Rows: per-layer trees, so that no weight is sliced in a step. Features: `cpu.feature_weights`.
    """
    if isinstance(params, FeatureWeights):
        return params
    if feature_major(params, config):
        return cpu.feature_weights(params, config)
    if config.runtime.decode_layout == "gathered":
        axes = transformer.logical_axes(config)
        return transformer.split_layers(gather_for_decode(params, axes, config.runtime.compute_dtype))
    return transformer.split_layers(params)


def stepping(config: ModelConfig) -> contextlib.AbstractContextManager:
    """What the loop of decode steps is traced in."""
    return decode_layout() if config.runtime.decode_layout == "gathered" else contextlib.nullcontext()


def settled(
    config: ModelConfig, prompt_cache: PromptCache, cache: DecodeCache | RowCache
) -> tuple[PromptCache, DecodeCache | RowCache]:
    """The caches as the loop carries them, inside `stepping`."""
    gathered = config.runtime.decode_layout == "gathered"
    return spread_caches(prompt_cache, cache) if gathered else (prompt_cache, cache)


def spread_caches(
    prompt_cache: PromptCache, cache: DecodeCache | RowCache
) -> tuple[PromptCache, DecodeCache | RowCache]:
    """Both caches with their rows and K/V heads split over the current mesh, by the rules in force."""
    if isinstance(cache, RowCache):
        return prompt_cache, cache
    axes = ("keys", "kv", "head_dim")
    prompts = jax.tree.map(lambda x: constrain(x, BATCH[0], *axes), prompt_cache.layers)
    rows = jax.tree.map(lambda x: constrain(x, *BATCH, *axes), cache.layers)
    return prompt_cache.replace(layers=prompts), cache.replace(layers=rows)


def prefill(
    params: Params, config: ModelConfig, prompt: Array, prompt_length: Array
) -> tuple[Array, PromptCache]:
    """`transformer.prefill` with the cache in the layout that decoding will read."""
    logits, cache = transformer.prefill(params, config, prompt, prompt_length)
    return logits, cpu.prompt_cache(cache) if feature_major(params, config) else cache


def extend(
    params: Params, config: ModelConfig, tokens: Array, count: Array, known: PromptCache
) -> tuple[Array, PromptCache]:
    """`extend.extend` of what `row_as_prompt` found, with the cache in the layout that decoding will read."""
    logits, cache = extension.extend(params, config, tokens, count, known)
    return logits, cpu.prompt_cache(cache) if feature_major(params, config) else cache


def row_as_prompt(
    prompts: PromptCache, cache: DecodeCache | RowCache, place: Array, first: Array, known: Array
) -> PromptCache:
    """The first `known` tokens of a row, prompt and completion, as a prompt's [1, S, K, H], S as it is there.

    place []: the row, of one sample a prompt. first []: the slot of its token 0 in the ring.
    """
    length, by_feature = prompts.length[place], isinstance(cache, RowCache)

    def one(of_prompt: Array, own: Array, axes: tuple[int, int, int]) -> Array:
        own = own[place] if by_feature else own[place, 0]
        of_prompt, own = (x.transpose(axes) if by_feature else x for x in (of_prompt[place], own))
        slot = jnp.arange(len(of_prompt))
        index = jnp.where(slot < length, slot, len(of_prompt) + (first + slot - length) % len(own))
        return jnp.concatenate([of_prompt, own])[index][None]

    layers = tuple(
        (one(prompt_k, k, (2, 0, 1)), one(prompt_v, v, (1, 0, 2)))
        for (prompt_k, prompt_v), (k, v) in zip(prompts.layers, cache.layers, strict=True)
    )
    return PromptCache(layers, known[None])


def init_decode_cache(
    params: Params, config: ModelConfig, prompts: int, group: int, slots: int
) -> DecodeCache | RowCache:
    """An empty cache for `slots` completion tokens of `group` samples of each prompt, in the layout."""
    module = cpu if feature_major(params, config) else transformer
    return module.init_decode_cache(config, prompts, group, slots)


def widened(prompts: PromptCache, cache: DecodeCache | RowCache, slots: int) -> PromptCache:
    """The cache of prompts with so many more slots, in the layout of `cache`."""
    axes = (3, 2) if isinstance(cache, RowCache) else (1, 1)

    def wider(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, slots if i == axis else 0) for i in range(x.ndim)])

    return prompts.replace(layers=tuple((wider(k, axes[0]), wider(v, axes[1])) for k, v in prompts.layers))


def take_rows(cache: DecodeCache | RowCache, row: Array) -> DecodeCache | RowCache:
    """The rows p*G + g listed in row [R] of a cache, as R prompts with one sample each."""
    if isinstance(cache, RowCache):
        return jax.tree.map(lambda x: x[row], cache)
    return jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:])[row], cache)


def decode_step(
    params: Params | FeatureWeights,
    config: ModelConfig,
    token: Array,
    t: Array,
    prompt_cache: PromptCache,
    cache: DecodeCache | RowCache,
    start: Array | None = None,
) -> tuple[Array, DecodeCache | RowCache]:
    """One token of every sample with prepared parameters: see `transformer.decode_step`."""
    module = cpu if isinstance(params, FeatureWeights) else transformer
    return module.decode_step(params, config, token, t, prompt_cache, cache, start)
