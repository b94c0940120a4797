"""One switch for attention: XLA whole or in blocks, or the platform's fused kernel, with the same numbers.

    auto      whole scores for short rows, blocks of keys for long ones (`chunked.attend`)
    xla       whole scores always
    chunked   blocks of keys always
    splash    Pallas splash attention, on a TPU
    cudnn     cuDNN through `jax.nn.dot_product_attention`, on an NVIDIA GPU, in bfloat16 or float16

Splash attention reads no mask. What it computes is told by two fields of `Keys`: `causal` of a row's own
keys, `length` of the keys of its prompt. A call without them, or of a shape that the kernel does not take (a
single query while decoding, a sliding window, a split sequence), goes by `auto`.

A group is one call of splash attention without a copy of its prompt: the queries of all samples stand in one
sequence of G N queries against S prompt slots and G N own ones, under a mask that is known when the program
is compiled (every sample sees the prompt and its own past), so that blocks of other samples cost nothing.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from gtalign_jax.mesh.sharding import partition_spec
from gtalign_jax.models import attention, chunked
from gtalign_jax.models.attention import Keys
from gtalign_jax.models.config import ATTENTION
from gtalign_jax.types import Array

_HEAD_WIDTH = 128  # the TPU kernel takes multiples of it


def attend(query: Array, own: Keys, shared: Keys | None = None, *, kind: str = "auto") -> Array:
    """`attention.attend` by the implementation `kind`: query [P, G, N, Q, H] → [P, G, N, Q, H].

    Raises ValueError on a kind that is not one of `config.ATTENTION`.
    """
    if kind not in ATTENTION:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(ATTENTION)}")
    if kind == "xla":
        return attention.attend(query, own, shared)
    if kind == "chunked" and query.shape[2] > 1:
        return chunked.attend_chunked(query, own, shared)
    if kind == "splash" and splash_takes(query, own, shared):
        return attend_splash(query, own, shared)
    if kind == "cudnn" and query.shape[2] > 1:
        return attend_library(query, own, shared, implementation="cudnn")
    return chunked.attend(query, own, shared)


def attend_library(
    query: Array,
    own: Keys,
    shared: Keys | None = None,
    *,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> Array:
    """`attention.attend` through `jax.nn.dot_product_attention`, the prompt's keys before a sample's own.

    Unlike splash this copies the keys, which are few heads wide, and gives the kernel the masks as they are.
    """
    p, g, n = query.shape[:3]
    keys = own if shared is None else attention.joined(shared, own, n)
    mask = jnp.broadcast_to(keys.mask, (p, g, n, keys.k.shape[2]))
    q, k, v, mask = (x.reshape(p * g, *x.shape[2:]) for x in (query, keys.k, keys.v, mask))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=implementation)
    return out.reshape(query.shape)


def splash_takes(query: Array, own: Keys, shared: Keys | None) -> bool:
    """Whether the TPU kernel can compute this call on the current mesh."""
    known = own.causal and (shared is None or shared.length is not None)
    if not known or query.shape[2] == 1 or query.shape[-1] % _HEAD_WIDTH:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    shape = dict(mesh.shape)
    # A device needs its queries' keys whole, and the K/V heads of its query heads.
    return shape.get("context", 1) == 1 and own.k.shape[-2] % shape.get("tensor", 1) == 0


def attend_splash(query: Array, own: Keys, shared: Keys | None = None, *, interpret: bool = False) -> Array:
    """`attention.attend` by the TPU kernel, each device on its own rows and heads; see `splash_takes`.

    The scaled query is rounded to its dtype once more than in `attention.attend`. interpret: without a TPU.
    """
    mesh = jax.sharding.get_abstract_mesh()
    arrays = [query, own.k, own.v]
    names: list[tuple[str, ...]]
    names = [("batch", "group", "keys", head, "head_dim") for head in ("heads", "kv", "kv")]
    if shared is not None:
        arrays += [shared.k, shared.v, shared.length]
        names += [("batch", "keys", "kv", "head_dim")] * 2 + [("batch",)]
    # Only here, because the kernels take a second to import.
    from gtalign_jax.models import splash

    local = functools.partial(splash.attend_group, interpret=interpret)
    if not mesh.shape:
        return local(*arrays)
    specs = tuple(partition_spec(n, x.shape, mesh) for n, x in zip(names, arrays, strict=True))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)
