"""Attention over two sets of keys under one softmax: a prompt shared by a group, and the row's own.

One function serves training, prefill and decoding. The prompt's keys and values are stored once per
group and never copied per sample; query heads are grouped by key/value head, so K/V are never repeated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gtalign_jax.models.products import settled
from gtalign_jax.types import Array

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
    if shared is not None and n == 1:
        return _attend_apart(q, own, shared).reshape(query.shape)
    keys = own if shared is None else joined(shared, own, n)
    return _attend(q, keys.k, keys.v, keys.mask).reshape(query.shape)


def joined(shared: Keys, own: Keys, n: int) -> Keys:
    """The prompt's keys before each sample's own, for n queries: a copy of few heads; scores have all."""
    p, g = own.k.shape[:2]
    old = (jnp.broadcast_to(x[:, None], (p, g, *x.shape[1:])) for x in (shared.k, shared.v))
    k, v = (jnp.concatenate(pair, axis=2) for pair in zip(old, (own.k, own.v), strict=True))
    masks = [jnp.broadcast_to(x.mask, (p, g, n, x.k.shape[-3])) for x in (shared, own)]
    return Keys(k, v, jnp.concatenate(masks, axis=-1))


def _attend_apart(q: Array, own: Keys, shared: Keys) -> Array:
    """Over both kinds of keys where they lie, for a decode step, which must not copy a cache."""
    old = _scores("pgnkrh,pskh->pgknrs", q, shared.k, shared.mask)
    new = _scores("pgnkrh,pgmkh->pgknrm", q, own.k, own.mask)
    top = jnp.maximum(old.max(-1), new.max(-1))[..., None]
    old, new = jnp.exp(old - top), jnp.exp(new - top)
    out = _product("pgknrs,pskh->pgnkrh", old.astype(q.dtype), shared.v)
    out += _product("pgknrm,pgmkh->pgnkrh", new.astype(q.dtype), own.v)
    return (out / _per_query(old.sum(-1) + new.sum(-1))).astype(q.dtype)


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """q [P, G, N, K, R, H] over k, v [P, G, M, K, H] under mask [P, G, N, M].

    With scores s and their maximum m: weights e = exp(s - m), o = sum e v / z, z = sum e. Backward, with
    d = do / z: dv = e^T d, ds = e (d v^T - sum(d * o)), dq = ds k, dk = ds^T q; kept are e, z and o.
    """
    return _forward(q, k, v, mask)[0]


def _forward(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple]:
    scores = _scores("pgnkrh,pgmkh->pgknrm", q, k, mask)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1)
    # `settled` products: a CPU's compiler would turn the weights rather than the far smaller result.
    out = settled(_product("pgknrm,pgmkh->pgknrh", weights.astype(v.dtype), v)).swapaxes(2, 3)
    out = (out / _per_query(total)).astype(q.dtype)
    return out, (q, k, v, mask, weights, total, out)


def _backward(saved: tuple, d_out: Array) -> tuple:
    q, k, v, mask, weights, total, out = saved
    d = d_out.astype(jnp.float32) / _per_query(total)
    delta = jnp.sum(d * out.astype(jnp.float32), axis=-1).swapaxes(2, 3)[..., None]
    d = d.astype(q.dtype)
    d_scores = weights * (_product("pgnkrh,pgmkh->pgknrm", d, v) - delta)
    # A masked score is a constant, even where all of a row's are and the weights are not zero.
    d_scores = (jnp.where(_spread(mask), d_scores, 0.0) * q.shape[-1] ** -0.5).astype(q.dtype)
    weights = weights.astype(q.dtype)
    d_q = settled(_product("pgknrm,pgmkh->pgknrh", d_scores, k)).swapaxes(2, 3)
    d_k, d_v = (
        settled(_product("pgnkrh,pgknrm->pgkhm", x, by_key)).transpose(0, 1, 4, 2, 3)
        for x, by_key in ((q, d_scores), (d, weights))
    )
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _scores(spec: str, q: Array, k: Array, mask: Array) -> Array:
    # Scaled in float32: a query scaled in bfloat16 would be rounded once more.
    return jnp.where(_spread(mask), _product(spec, q, k) * q.shape[-1] ** -0.5, _MASKED)


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _spread(mask: Array) -> Array:
    """A mask [P, G, N, M] over the heads of scores [P, G, K, N, R, M]."""
    return mask[:, :, None, :, None]


def _per_query(x: Array) -> Array:
    """[P, G, K, N, R] -> [P, G, N, K, R, 1]."""
    return x.swapaxes(2, 3)[..., None]


def ring_visible(number: Array, t: Array, slots: int, window: int | None) -> Array:
    """[..., slots] bool: the slots of a ring that a row's token number [...] sees when the ring is at t.

    Token t of the ring stands in slot t % slots, so slot j was written (t - j) % slots steps ago; a row that
    has written `number` tokens before this one sees no slot older than that, within `window` tokens if given.
    """
    age = (t - jnp.arange(slots)) % slots
    seen = age <= number[..., None]
    return seen if window is None else seen & (age < window)


def visible(query_pos: Array, key_pos: Array, window: Array | int | None) -> Array:
    """Causal mask [..., N, M] from positions [..., N] and [..., M], within `window` tokens if given."""
    distance = query_pos[..., :, None] - key_pos[..., None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
