"""Log-probabilities of given tokens: the only place where predictions meet the tokens they predict.

Logits exist for `chunk` tokens of a device at a time, forward and backward, so `[B, T, V]` never does. Every
device scores the tokens it holds: the vocabulary table is gathered over the batch axes of the mesh once
before the first chunk, and its gradient is added up on each device and summed over them once after the last.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.transformer import Segments, forward, forward_shared
from gtalign_jax.sharding import constrain, pieces
from gtalign_jax.types import Array, PyTree, Rollout

CHUNK = 1024


LimitLogits = Callable[[PyTree, Array], Array]


class Limit(NamedTuple):
    """What tokens were drawn from when not all were open, as when decoding is held to a grammar.

    states: Rollout → a pytree of [P, G, N] integers, where each token was chosen. logits: (states [...],
    logits [..., V]) → logits far below all others, and finite, where a token was not open.
    """

    states: Callable[[Rollout], PyTree]
    logits: LimitLogits


def token_logprobs(
    params: PyTree,
    config: ModelConfig,
    prompt: Array,
    prompt_length: Array,
    completion: Array,
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    limit: LimitLogits | None = None,
    at: PyTree | None = None,
    segments: Segments | None = None,
) -> tuple[Array, Array]:
    """(logprobs, entropies) [P, G, N] float32 of completion [P, G, N] after prompt [P, S].

    Column n is log p(token n | prompt, tokens before n) of softmax(logits / temperature). Columns past a
    row's length are finite and meaningless. chunk: tokens of a device whose logits exist at a time.
    limit, at: `Limit.logits` and the states it is told, both under the distribution they leave.
    segments: of packed rows, see `forward_shared`.
    """
    hidden = forward_shared(params, config, prompt, prompt_length, completion, segments)
    return _from_hidden(params, config, hidden, completion, temperature, chunk, limit, at)


def row_logprobs(
    params: PyTree,
    config: ModelConfig,
    tokens: Array,
    length: Array,
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Array:
    """log p(token t + 1 | tokens up to t): [B, T - 1] float32 for rows tokens [B, T]."""
    hidden = forward(params, config, tokens, length)[:, None, :-1]
    return _from_hidden(params, config, hidden, tokens[:, None, 1:], temperature, chunk)[0][:, 0]


def packed_logprobs(
    params: PyTree, config: ModelConfig, tokens: Array, segments: Array, positions: Array
) -> tuple[Array, Array]:
    """(logprobs, entropies) [B, T - 1] float32 of tokens 1.. of packed rows [B, T].

    Column t is log p(token t + 1 | tokens of its chain up to t); across the border of two chains and in the
    padding it is finite and meaningless. segments, positions: as of `models.transformer.forward`.
    """
    length = jnp.full(len(tokens), tokens.shape[1], jnp.int32)
    hidden = forward(params, config, tokens, length, segment_ids=segments, positions=positions)
    scored = _from_hidden(params, config, hidden[:, None, :-1], tokens[:, None, 1:], 1.0, CHUNK)
    return tuple(x[:, 0] for x in scored)


def _from_hidden(
    params: PyTree,
    config: ModelConfig,
    hidden: Array,
    tokens: Array,
    temperature: float,
    chunk: int,
    limit: LimitLogits | None = None,
    at: PyTree | None = None,
) -> tuple[Array, Array]:
    """Logprobs and entropies [P, G, N] of tokens [P, G, N] from the states [P, G, N, D] before them."""
    table = params["embedding" if config.tie_embeddings else "unembedding"]
    shape, split = tokens.shape, pieces(("batch", "group", "length"), tokens.shape)
    rows = constrain(_by_device(hidden, split), "shards", "width", "width")
    given = jax.tree.map(lambda x: constrain(_by_device(x, split), "shards", "width"), (tokens, at))
    scored = _score(temperature, chunk, limit, table, rows, given)
    logp, entropy = (_by_position(x, shape, split) for x in scored)
    return logp, entropy


# --- tokens by the device that holds them -------------------------------------------------------


def _by_device(x: Array, split: tuple[int, ...]) -> Array:
    """x [P, G, N, ...] as [devices, tokens of one, ...]; split: into how many parts P, G and N are cut."""
    cut = [size for part, dim in zip(split, x.shape, strict=False) for size in (part, dim // part)]
    x = x.reshape(*cut, *x.shape[3:]).transpose(0, 2, 4, 1, 3, 5, *range(6, x.ndim + 3))
    return x.reshape(math.prod(split), -1, *x.shape[6:])


def _by_position(x: Array, shape: tuple[int, ...], split: tuple[int, ...]) -> Array:
    """The inverse of `_by_device` for x [devices, tokens of one]."""
    x = x.reshape(*split, *(dim // part for part, dim in zip(split, shape, strict=True)))
    x = x.transpose(0, 3, 1, 4, 2, 5).reshape(shape)
    return constrain(x, "batch", "group", "length")


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


# --- scores and their gradient ------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _score(
    temperature: float, chunk: int, limit: LimitLogits | None, table: Array, hidden: Array, given: PyTree
):
    """(log p, entropy) [devices, L] of tokens [devices, L]; p = softmax(hidden table^T / temperature).

    table [V, D]; hidden [devices, L, D]. With logits l, their log-sum z and mean m = sum_v p_v l_v, a token
    c has log p = l_c - z and the distribution has entropy z - m; the gradients by l_v are [v = c] - p_v and
    -p_v (l_v - m). Backward keeps z and m and computes the logits again. given: the tokens, and the states
    at which `limit` leaves some of them out (p_v = 0).
    """
    return _score_forward(temperature, chunk, limit, table, hidden, given)[0]


def _score_forward(temperature: float, chunk: int, limit: LimitLogits | None, table, hidden, given):
    whole = _gathered(table, hidden)

    def step(_, xs):
        hidden, (tokens, at) = xs
        logits = _logits(whole, hidden, temperature, limit, at)
        top = logits.max(-1, keepdims=True)
        total, weighted, chosen = _sums(logits, top, tokens)
        log_norm = jnp.log(total) + top[..., 0]
        return None, (chosen - log_norm, log_norm, weighted / total)

    _, columns = jax.lax.scan(step, None, _in_chunks(chunk, (hidden, given)))
    logp, log_norm, mean = (_joined(x, hidden.shape[1]) for x in columns)
    return (logp, log_norm - mean), (table, hidden, given, log_norm, mean)


def _score_backward(
    temperature: float, chunk: int, limit: LimitLogits | None, saved: tuple, gradients: tuple[Array, Array]
):
    table, hidden, given, log_norm, mean = saved
    whole = _gathered(table, hidden)

    def step(d_table, xs):
        hidden, (tokens, at), log_norm, mean, d_logp, d_entropy = xs
        per_token = lambda x: x[..., None]
        logits = _logits(whole, hidden, temperature, limit, at)
        slope = per_token(d_logp) + per_token(d_entropy) * (logits - per_token(mean))
        chosen = jnp.where(_is_token(logits, tokens), per_token(d_logp), 0.0)
        d_logits = chosen - jnp.exp(logits - per_token(log_norm)) * slope
        d_logits = (d_logits / temperature).astype(hidden.dtype)
        # Turned, [D, V], because a product on a CPU would turn the far larger logits otherwise.
        add = jnp.einsum("std,stv->sdv", hidden, d_logits, preferred_element_type=jnp.float32)
        return split(d_table + add), jnp.einsum("stv,svd->std", d_logits, whole)

    split = lambda turned: constrain(turned, "shards", "width", "vocab")
    zero = split(jnp.zeros(whole.swapaxes(1, 2).shape, jnp.float32))
    chunks = _in_chunks(chunk, (hidden, given, log_norm, mean, *gradients))
    d_table, d_hidden = jax.lax.scan(step, zero, chunks)
    d_table = constrain(d_table.sum(0).T, "vocab", "embed").astype(table.dtype)
    return d_table, _joined(d_hidden, hidden.shape[1]), None


_score.defvjp(_score_forward, _score_backward)


def _gathered(table: Array, hidden: Array) -> Array:
    """The table once per device that holds tokens, [devices, V, D] in the dtype of hidden."""
    return _split(jnp.broadcast_to(table.astype(hidden.dtype), (hidden.shape[0], *table.shape)))


def _split(tables: Array) -> Array:
    return constrain(tables, "shards", "vocab", "width")


def _logits(
    tables: Array, hidden: Array, temperature: float, limit: LimitLogits | None, at: PyTree | None
) -> Array:
    """[devices, l, V] float32 from tables [devices, V, D] and hidden [devices, l, D]."""
    logits = jnp.einsum("std,svd->stv", hidden, tables, preferred_element_type=jnp.float32)
    logits = constrain(logits, "shards", "width", "vocab") / temperature
    return logits if limit is None else limit(at, logits)


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
    both = (x.sum(-2).sum(-1) for x in (weights, weights * blocks))
    return *both, jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]


def _is_token(logits: Array, tokens: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == tokens[..., None]
