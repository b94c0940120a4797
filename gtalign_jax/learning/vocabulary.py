"""Scores of given tokens from the states before them, and their gradients: the pass over the vocabulary.

Logits exist for `Head.chunk` tokens of a device at a time, forward and backward, so `[B, T, V]` never
does. The table is gathered over the batch axes of the mesh once before the first chunk, and its gradient is
added up on each device and summed over them once after the last.

Two functions, which differ in when a gradient is known. `scores` learns it from what is made of its results:
backward computes the logits again. `losses` is told what each token adds to the loss: it takes the gradient
from the same logits, and backward has nothing left to compute.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gtalign_jax.mesh.sharding import constrain
from gtalign_jax.types import Array, LimitLogits, PyTree

CHUNK = 1024

TokenLoss = Callable[[Array, Array, PyTree], Array]


@dataclasses.dataclass(frozen=True)
class Head:
    """How logits are read: p = softmax(limit(logits / temperature)), `chunk` tokens of a device at a time.

    limit: (states [...], logits [..., V]) → logits far below all others, and finite, of tokens left out.
    """

    temperature: float = 1.0
    chunk: int = CHUNK
    limit: LimitLogits | None = None


PLAIN = Head()


class Given(NamedTuple):
    """tokens [devices, L] int32; at: the states [devices, L] that `Head.limit` is told, or None."""

    tokens: Array
    at: PyTree | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scores(head: Head, table: Array, hidden: Array, given: Given) -> tuple[Array, Array]:
    """(log p, entropy) [devices, L] float32 of the given tokens; table [V, D], hidden [devices, L, D].

    With logits l, their log-sum z and mean m = sum_v p_v l_v, a token c has log p = l_c - z and the
    distribution has entropy z - m; the gradients by l_v are [v = c] - p_v and -p_v (l_v - m). Kept for
    backward are z and m.
    """
    return _scores_forward(head, table, hidden, given)[0]


def _scores_forward(
    head: Head, table: Array, hidden: Array, given: Given
) -> tuple[tuple[Array, Array], tuple]:
    whole = _gathered(table, hidden)

    def step(_: None, xs: PyTree) -> tuple[None, _Read]:
        hidden, given = xs
        return None, _read(_logits(head, whole, hidden, given), given)

    _, columns = jax.lax.scan(step, None, _in_chunks(head.chunk, (hidden, given)))
    read = jax.tree.map(lambda x: _joined(x, hidden.shape[1]), columns)
    return (read.logp, read.entropy), (table, hidden, given, read)


def _scores_backward(head: Head, saved: tuple, slopes: tuple[Array, Array]) -> tuple[Array, Array, None]:
    table, hidden, given, read = saved
    whole = _gathered(table, hidden)

    def step(d_table: Array, xs: PyTree) -> tuple[Array, Array]:
        hidden, given, read, slopes = xs
        logits = _logits(head, whole, hidden, given)
        d_logits = _d_logits(head, logits, given, read, slopes, hidden.dtype)
        return _pulled(d_table, whole, hidden, d_logits)

    chunks = _in_chunks(head.chunk, (hidden, given, read, slopes))
    d_table, d_hidden = jax.lax.scan(step, _no_gradient(whole), chunks)
    return _table_gradient(d_table, table), _joined(d_hidden, hidden.shape[1]), None


scores.defvjp(_scores_forward, _scores_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def losses(
    head: Head, loss: TokenLoss, table: Array, hidden: Array, given: Given, columns: PyTree
) -> tuple[Array, Array, Array]:
    """(total [], log p, entropy [devices, L]): the total is the sum of loss(log p, entropy, columns).

    loss: arrays [...] → what each token adds, which may depend on that token alone. columns: a pytree of
    [devices, L]; where all of them are zero the loss must be zero. Only the total has a gradient.
    """
    logp, entropy = scores(head, table, hidden, given)
    return jnp.sum(loss(logp, entropy, columns)), logp, entropy


def _losses_forward(
    head: Head, loss: TokenLoss, table: Array, hidden: Array, given: Given, columns: PyTree
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    whole = _gathered(table, hidden)

    def step(d_table: Array, xs: PyTree) -> tuple[Array, PyTree]:
        hidden, given, columns = xs
        logits = _logits(head, whole, hidden, given)
        read = _read(logits, given)
        added, pull = jax.vjp(lambda logp, entropy: loss(logp, entropy, columns), read.logp, read.entropy)
        d_logits = _d_logits(head, logits, given, read, pull(jnp.ones_like(added)), hidden.dtype)
        d_table, d_hidden = _pulled(d_table, whole, hidden, d_logits)
        return d_table, (d_hidden, added, read.logp, read.entropy)

    chunks = _in_chunks(head.chunk, (hidden, given, columns))
    d_table, found = jax.lax.scan(step, _no_gradient(whole), chunks)
    d_hidden, added, logp, entropy = (_joined(x, hidden.shape[1]) for x in found)
    return (jnp.sum(added), logp, entropy), (_table_gradient(d_table, table), d_hidden)


def _losses_backward(
    head: Head, loss: TokenLoss, saved: tuple[Array, Array], slopes: tuple
) -> tuple[Array, Array, None, None]:
    d_table, d_hidden = saved
    scaled = jax.tree.map(lambda x: (x * slopes[0]).astype(x.dtype), (d_table, d_hidden))
    return *scaled, None, None


losses.defvjp(_losses_forward, _losses_backward)


class _Read(NamedTuple):
    """Of each token: log p, the entropy, z and m as in `scores`."""

    logp: Array
    entropy: Array
    log_norm: Array
    mean: Array


def _logits(head: Head, tables: Array, hidden: Array, given: Given) -> Array:
    """[devices, l, V] float32 from tables [devices, V, D] and hidden [devices, l, D]."""
    logits = jnp.einsum("std,svd->stv", hidden, tables, preferred_element_type=jnp.float32)
    logits = constrain(logits, "shards", "width", "vocab") / head.temperature
    return logits if head.limit is None else head.limit(given.at, logits)


def _read(logits: Array, given: Given) -> _Read:
    top = logits.max(-1, keepdims=True)
    total, weighted, chosen = _sums(logits, top, given.tokens)
    log_norm, mean = jnp.log(total) + top[..., 0], weighted / total
    return _Read(chosen - log_norm, log_norm - mean, log_norm, mean)


def _sums(logits: Array, top: Array, tokens: Array) -> tuple[Array, Array, Array]:
    """Sums over the vocabulary of w = exp(logits - top) and of w logits, and the logit of the token."""
    return jax.lax.platform_dependent(logits, top, tokens, cpu=_sums_of_blocks, default=_sums_whole)


def _sums_whole(logits: Array, top: Array, tokens: Array) -> tuple[Array, Array, Array]:
    weights = jnp.exp(logits - top)
    chosen = jnp.where(_is_token(logits, tokens), logits, 0.0)
    return weights.sum(-1), (weights * logits).sum(-1), chosen.sum(-1)


def _sums_of_blocks(logits: Array, top: Array, tokens: Array) -> tuple[Array, Array, Array]:
    """A quarter of the time on a CPU, whose sum along the last axis is a loop over single numbers."""
    blocks = logits.reshape(*logits.shape[:-1], math.gcd(logits.shape[-1], 128), -1)
    weights = jnp.exp(blocks - top[..., None])
    total, weighted = (x.sum(-2).sum(-1) for x in (weights, weights * blocks))
    return total, weighted, jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]


def _d_logits(head: Head, logits: Array, given: Given, read: _Read, slopes: tuple, dtype: Any) -> Array:
    """The gradient by the logits before the temperature, from those by log p and by the entropy."""
    d_logp, d_entropy = slopes
    slope = d_logp[..., None] + d_entropy[..., None] * (logits - read.mean[..., None])
    chosen = jnp.where(_is_token(logits, given.tokens), d_logp[..., None], 0.0)
    d_logits = chosen - jnp.exp(logits - read.log_norm[..., None]) * slope
    return (d_logits / head.temperature).astype(dtype)


def _is_token(logits: Array, tokens: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == tokens[..., None]


def _gathered(table: Array, hidden: Array) -> Array:
    """The table once per device that holds tokens, [devices, V, D] in the dtype of hidden."""
    tables = jnp.broadcast_to(table.astype(hidden.dtype), (hidden.shape[0], *table.shape))
    return constrain(tables, "shards", "vocab", "width")


def _no_gradient(tables: Array) -> Array:
    """Zeros for the gradient of the tables, turned: [devices, D, V] float32."""
    return _turned(jnp.zeros(tables.swapaxes(1, 2).shape, jnp.float32))


def _turned(d_table: Array) -> Array:
    return constrain(d_table, "shards", "width", "vocab")


def _pulled(d_table: Array, tables: Array, hidden: Array, d_logits: Array) -> tuple[Array, Array]:
    """(d_table with a chunk's part added, the gradient by hidden [devices, l, D])."""
    # Turned, [D, V], because a product on a CPU would turn the far larger logits otherwise.
    add = jnp.einsum("std,stv->sdv", hidden, d_logits, preferred_element_type=jnp.float32)
    return _turned(d_table + add), jnp.einsum("stv,svd->std", d_logits, tables)


def _table_gradient(d_table: Array, table: Array) -> Array:
    return constrain(d_table.sum(0).T, "vocab", "embed").astype(table.dtype)


def _in_chunks(chunk: int, arrays: PyTree) -> PyTree:
    """Arrays [devices, L, ...] as [chunks, devices, l, ...] with l <= chunk; spare tokens are zeros."""
    length = jax.tree.leaves(arrays)[0].shape[1]
    count = -(-length // chunk)
    size = -(-length // count)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, size * count - length if axis == 1 else 0) for axis in range(x.ndim)])
        return x.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(cut, arrays)


def _joined(x: Array, length: int) -> Array:
    """The inverse of `_in_chunks` for one array."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
