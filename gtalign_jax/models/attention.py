"""Attention over two sets of keys under one softmax: a prompt shared by a group, and the row's own.

One function serves training, prefill and decoding. The prompt's keys and values are stored once per
group and never copied per sample; query heads are grouped by key/value head, so K/V are never repeated.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
_MASKED = -1e30  # finite, so that a fully masked row has no NaN in value or gradient


class Keys(NamedTuple):
    """k, v [P, S, K, H] (shared by the group) or [P, G, N, K, H]; mask broadcasts to scores.

    What fused kernels (`fused`) read in place of a mask, and only where it says the same: causal: each token
    sees its own row's past. length [P]: every query sees the slots below it.
    """

    k: Array
    v: Array
    mask: Array
    causal: bool = False
    length: Array | None = None


def attend(query: Array, own: Keys, shared: Keys | None = None) -> Array:
    """Softmax attention of query [P, G, N, Q, H] over `shared` then `own` keys.

    own.mask broadcasts to [P, G, N, M], shared.mask to [P, G, N, S]. Scores and softmax are float32.
    Returns [P, G, N, Q, H] in the query's dtype.
    """
    p, g, n, heads, dim = query.shape
    kv_heads = own.k.shape[-2]
    q = query.reshape(p, g, n, kv_heads, heads // kv_heads, dim)
    parts = [(own, "pgnkrh,pgmkh->pgkrnm", "pgkrnm,pgmkh->pgnkrh")]
    if shared is not None:
        parts.insert(0, (shared, "pgnkrh,pskh->pgkrns", "pgkrns,pskh->pgnkrh"))
    scores = jnp.concatenate([_scores(q, keys, spec) for keys, spec, _ in parts], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    out, start = 0.0, 0
    for keys, _, spec in parts:
        width = keys.k.shape[-3]
        out += jnp.einsum(spec, weights[..., start : start + width], keys.v)
        start += width
    return out.reshape(p, g, n, heads, dim)


def _scores(q: Array, keys: Keys, spec: str) -> Array:
    # Scaled in float32: a query scaled in bfloat16 would be rounded once more.
    scores = jnp.einsum(spec, q, keys.k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.where(keys.mask[:, :, None, None], scores, _MASKED)


def visible(query_pos: Array, key_pos: Array, window: Array | int | None) -> Array:
    """Causal mask [..., N, M] from positions [..., N] and [..., M], within `window` tokens if given."""
    distance = query_pos[..., :, None] - key_pos[..., None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
