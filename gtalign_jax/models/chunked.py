"""Attention that never holds all scores: `attention.attend` in blocks of keys, for long contexts.

Forward, over blocks of keys j, with running maximum m, sum z and output o of every query (the online
softmax of FlashAttention, arXiv 2205.14135):

    m' = max(m, max_j s_j)                     z' = z exp(m - m') + sum_j exp(s_j - m')
    o' = o exp(m - m') + exp(s_j - m') v_j     in the end o / z

Backward recomputes the weights p_j = exp(s_j - lse) of a block from the saved log-sum-exp and output:

    dv_j = p_j^T do     ds_j = p_j (do v_j^T - sum(do * o))     dq += ds_j k_j     dk_j = ds_j^T q

so that memory is linear in the context: the largest temporary is the scores of one block.
"""

import functools

import jax
import jax.numpy as jnp

from gtalign_jax.models import attention
from gtalign_jax.models.attention import Keys
from gtalign_jax.types import Array

BLOCK = 512
LONG = 2**20  # query-key pairs of one head and row from which on scores are not held whole
_MASKED = -1e30  # finite, as in `attention`: a fully masked row averages its values and has no NaN

# (query x keys -> scores, weights x values -> output) for keys of the row and for keys of its group.
_SPECS = {
    5: ("pgnkrh,pgmkh->pgkrnm", "pgkrnm,pgmkh->pgnkrh"),
    4: ("pgnkrh,pmkh->pgkrnm", "pgkrnm,pmkh->pgnkrh"),
}
_TO_KEYS = {5: "pgkrnm,pgnkrh->pgmkh", 4: "pgkrnm,pgnkrh->pmkh"}


def attend(query: Array, own: Keys, shared: Keys | None = None) -> Array:
    """`attention.attend` for short rows and single queries (decoding), `attend_chunked` for long ones."""
    keys = own.k.shape[-3] + (0 if shared is None else shared.k.shape[-3])
    long = query.shape[2] > 1 and query.shape[2] * keys >= LONG
    return attend_chunked(query, own, shared) if long else attention.attend(query, own, shared)


def attend_chunked(query: Array, own: Keys, shared: Keys | None = None, *, block: int = BLOCK) -> Array:
    """What `attention.attend` returns, in blocks of `block` keys: same arguments, same numbers.

    query [P, G, N, Q, H]; returns [P, G, N, Q, H] in its dtype. Scores and sums are float32.
    """
    p, g, n, heads, dim = query.shape
    kv_heads = own.k.shape[-2]
    q = query.reshape(p, g, n, kv_heads, heads // kv_heads, dim)
    parts = (own,) if shared is None else (shared, own)
    out = _attention(q, tuple((x.k, x.v) for x in parts), tuple(x.mask for x in parts), block)
    return out.reshape(p, g, n, heads, dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(
    q: Array, keys: tuple[tuple[Array, Array], ...], masks: tuple[Array, ...], block: int
) -> Array:
    return _forward(q, keys, masks, block)[0]


def _forward(q: Array, keys: tuple, masks: tuple, block: int) -> tuple[Array, tuple]:
    """(output like q, residuals); lse [P, G, K, R, N] float32 is the log of every query's sum."""
    p, g, n, k, r, dim = q.shape
    rows = (p, g, k, r, n)
    carry = (jnp.full(rows, _MASKED), jnp.zeros(rows), jnp.zeros((p, g, n, k, r, dim), jnp.float32))

    def step(carry: tuple[Array, ...], xs: tuple[Array, ...], ndim: int) -> tuple[tuple, None]:
        top, total, out = carry
        k_block, v_block, mask = xs
        scores = _scores(q, k_block, mask, ndim)
        new_top = jnp.maximum(top, scores.max(-1))
        weights, keep = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        add = jnp.einsum(
            _SPECS[ndim][1], weights.astype(v_block.dtype), v_block, preferred_element_type=jnp.float32
        )
        return (new_top, total * keep + weights.sum(-1), out * _per_query(keep) + add), None

    for (keys_k, keys_v), mask in zip(keys, masks, strict=True):
        fold = functools.partial(step, ndim=keys_k.ndim)
        carry, _ = jax.lax.scan(fold, carry, _blocks(keys_k, keys_v, mask, block))
    top, total, out = carry
    out = (out / _per_query(total)).astype(q.dtype)
    return out, (q, keys, masks, out, top + jnp.log(total))


def _backward(block: int, saved: tuple, d_out: Array) -> tuple:
    q, keys, masks, out, lse = saved
    d_out = d_out.astype(q.dtype)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).transpose(0, 1, 3, 4, 2)
    d_q = jnp.zeros(q.shape, jnp.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def step(d_q: Array, xs: tuple[Array, ...], ndim: int) -> tuple[Array, tuple]:
        k_block, v_block, mask = xs
        to_scores, to_query = _SPECS[ndim]
        weights = jnp.exp(_scores(q, k_block, mask, ndim) - lse[..., None])
        d_v = product(_TO_KEYS[ndim], weights.astype(q.dtype), d_out)
        d_scores = weights * (product(to_scores, d_out, v_block) - delta[..., None])
        # A masked score is a constant, even where all of a row's are and the weights are not zero.
        d_scores = jnp.where(_spread(mask), d_scores, 0.0) * q.shape[-1] ** -0.5
        d_scores = d_scores.astype(q.dtype)
        d_k = product(_TO_KEYS[ndim], d_scores, q)
        return d_q + product(to_query, d_scores, k_block), (d_k.astype(q.dtype), d_v.astype(q.dtype))

    d_keys = []
    for (keys_k, keys_v), mask in zip(keys, masks, strict=True):
        fold = functools.partial(step, ndim=keys_k.ndim)
        d_q, (d_k, d_v) = jax.lax.scan(fold, d_q, _blocks(keys_k, keys_v, mask, block))
        d_keys.append((_joined(d_k, keys_k), _joined(d_v, keys_v)))
    return d_q.astype(q.dtype), tuple(d_keys), tuple(None for _ in masks)


_attention.defvjp(_forward, _backward)


def _scores(q: Array, k_block: Array, mask: Array, ndim: int) -> Array:
    scores = jnp.einsum(_SPECS[ndim][0], q, k_block, preferred_element_type=jnp.float32)
    return jnp.where(_spread(mask), scores * q.shape[-1] ** -0.5, _MASKED)


def _spread(mask: Array) -> Array:
    """A mask [P, G, N, M] over the heads of scores [P, G, K, R, N, M]."""
    return mask[:, :, None, None]


def _per_query(x: Array) -> Array:
    """[P, G, K, R, N] -> [P, G, N, K, R, 1]."""
    return x.transpose(0, 1, 4, 2, 3)[..., None]


def _blocks(k: Array, v: Array, mask: Array, block: int) -> tuple[Array, Array, Array]:
    """Keys, values and masks with their slots cut into blocks on a leading axis; spare slots are hidden."""
    slots = k.shape[-3]
    block = min(block, slots)
    spare = -slots % block
    mask = jnp.broadcast_to(mask, (*mask.shape[:-1], slots))

    def cut(x: Array, axis: int) -> Array:
        if spare:
            x = jnp.pad(x, [(0, spare if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)

    axis = k.ndim - 3
    return cut(k, axis), cut(v, axis), cut(mask, mask.ndim - 1)


def _joined(blocks: Array, like: Array) -> Array:
    """Gradients of blocks as the gradient of `like` [..., M, K, H], without the spare slots."""
    axis = like.ndim - 3
    whole = jnp.moveaxis(blocks, 0, axis)
    whole = whole.reshape(*like.shape[:axis], -1, *like.shape[axis + 1 :])
    return jax.lax.slice_in_dim(whole, 0, like.shape[axis], axis=axis).astype(like.dtype)
