"""One transformer layer as a Flax module that is only ever used through `init` and `apply`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gtalign_jax.mesh.sharding import constrain
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.products import gated, project
from gtalign_jax.models.rope import rotate
from gtalign_jax.types import Array

BATCH = ("batch", "group")  # logical names of the first two axes of every activation
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


def weight(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
    """A parameter with its logical axis names, cast to the compute dtype."""
    config: ModelConfig = module.config
    if name == "scale":
        init = nn.initializers.ones
    elif name == "bias":
        init = nn.initializers.zeros
    else:
        init = nn.initializers.normal(config.initializer_range)
    boxed = nn.with_logical_partitioning(init, axes)
    weights: Array = module.param(name, boxed, shape, jnp.dtype(config.runtime.param_dtype))
    return weights.astype(config.runtime.compute_dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    config: ModelConfig
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = weight(self, "scale", (x.shape[-1],), (self.axis,))
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return wide.astype(x.dtype) * scale


class Projection(nn.Module):
    """A linear map from the last `inputs` axes of x to `shape`, stored [inputs..., outputs...].

    Where a low-rank adapter stands beside the kernel (`models.lora`), its product is added. The result has
    the module's name for rematerialisation (`stack.KEPT`).
    """

    config: ModelConfig
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    inputs: int = 1
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        contracted = x.shape[x.ndim - self.inputs :]
        kernel = weight(self, "kernel", contracted + self.shape, self.axes)
        bias = weight(self, "bias", self.shape, self.axes[self.inputs :]) if self.bias else None
        y = project(x, kernel, bias, self.inputs)
        if self.has_variable("params", "lora_a"):
            y += self._low_rank(x)
        named: Array = checkpoint_name(y, self.name)
        return named

    def _low_rank(self, x: Array) -> Array:
        """scale (x A) B: two thin products, so that A B is never formed."""
        names = ("lora_a", "lora_b", "lora_scale")
        dtype = self.config.runtime.compute_dtype
        leaves: list[Array] = [self.get_variable("params", name).astype(dtype) for name in names]
        a, b, scale = leaves
        return jnp.tensordot(jnp.tensordot(x, a, self.inputs) * scale, b, 1)


class Block(nn.Module):
    """Pre-norm attention and gated MLP.

    x [P, G, T, D]; tables: cos, sin [..., T, H/2]; attend(q [P, G, T, Q, H], k, v [P, G, T, K, H])
    returns (out [P, G, T, Q, H], aux): it holds everything that differs between training, prefill and
    decoding. Returns (x, aux). Activations keep the batch and length split over the mesh; with a
    context axis each query's device gathers the keys.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, tables: tuple[Array, Array], attend: Attend) -> tuple[Array, Any]:
        c = self.config
        h = RMSNorm(c, name="attention_norm")(x)
        heads = ("embed", "heads", "head_dim")
        q = Projection(c, (c.num_heads, c.head_dim), heads, bias=c.qkv_bias, name="query")(h)
        heads = ("embed", "kv", "head_dim")
        k = Projection(c, (c.num_kv_heads, c.head_dim), heads, bias=c.qkv_bias, name="key")(h)
        v = Projection(c, (c.num_kv_heads, c.head_dim), heads, bias=c.qkv_bias, name="value")(h)
        if c.qk_norm:
            q = RMSNorm(c, "head_dim", name="query_norm")(q)
            k = RMSNorm(c, "head_dim", name="key_norm")(k)
        q = constrain(rotate(q, tables), *BATCH, "length", "heads", "head_dim")
        k, v = (constrain(y, *BATCH, "keys", "kv", "head_dim") for y in (rotate(k, tables), v))
        out, aux = attend(q, k, v)
        outputs = ("heads", "head_dim", "embed")
        x = x + Projection(c, (c.hidden_size,), outputs, 2, c.output_bias, name="output")(out)
        x = constrain(x, *BATCH, "length", "width")
        h = RMSNorm(c, name="mlp_norm")(x)
        axes = ("embed", "mlp")
        gate = Projection(c, (c.intermediate_size,), axes, bias=c.mlp_bias, name="gate")(h)
        up = Projection(c, (c.intermediate_size,), axes, bias=c.mlp_bias, name="up")(h)
        down = Projection(c, (c.hidden_size,), ("mlp", "embed"), bias=c.mlp_bias, name="down")
        inner = constrain(gated(gate, up), *BATCH, "length", "mlp")
        return constrain(x + down(inner), *BATCH, "length", "width"), aux
