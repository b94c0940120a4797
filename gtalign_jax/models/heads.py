"""The value model: the same trunk as the policy with a linear head instead of the vocabulary."""

import jax.numpy as jnp

from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.transformer import Params, Segments, forward_shared, logical_axes
from gtalign_jax.types import Array


def init_value_model(trunk: Params, config: ModelConfig) -> Params:
    """Critic parameters that start from a policy's trunk; the head starts at zero, so values do too.

    head [D] and bias [] float32. The trunk's arrays are not copied.
    """
    kept = {name: leaf for name, leaf in trunk.items() if name != "unembedding"}
    head = jnp.zeros((config.hidden_size,), jnp.float32)
    return {"trunk": kept, "head": head, "bias": jnp.zeros((), jnp.float32)}


def value_logical_axes(config: ModelConfig) -> Params:
    """The logical axis names of a critic, as `transformer.logical_axes` gives a policy's."""
    trunk = {name: axes for name, axes in logical_axes(config).items() if name != "unembedding"}
    return {"trunk": trunk, "head": ("embed",), "bias": ()}


def token_values(
    params: Params,
    config: ModelConfig,
    prompt: Array,
    prompt_length: Array,
    completion: Array,
    segments: Segments | None = None,
) -> Array:
    """V [P, G, N] float32: column n is the value of the state before completion token n.

    segments: of packed rows, see `forward_shared`.
    """
    hidden = forward_shared(params["trunk"], config, prompt, prompt_length, completion, segments)
    return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), params["head"]) + params["bias"]
