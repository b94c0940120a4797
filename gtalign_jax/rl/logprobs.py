"""Log-probabilities of given tokens: the only place where predictions meet the tokens they predict.

The vocabulary is visited in chunks of token positions and recomputed in the backward pass, so logits of
a whole batch never exist.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.transformer import forward, forward_shared, unembed
from gtalign_jax.types import Array, PyTree

CHUNK = 128


def token_logprobs(
    params: PyTree,
    config: ModelConfig,
    prompt: Array,
    prompt_length: Array,
    completion: Array,
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[Array, Array]:
    """(logprobs, entropies) [P, G, N] float32 of completion [P, G, N] after prompt [P, S].

    Column n is log p(token n | prompt, tokens before n) of softmax(logits / temperature). Columns past a
    row's length are finite and meaningless.
    """
    hidden = forward_shared(params, config, prompt, prompt_length, completion)
    return _from_hidden(params, config, hidden, completion, temperature, chunk)


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
    hidden = forward(params, config, tokens, length)[:, :-1]
    return _from_hidden(params, config, hidden, tokens[:, 1:], temperature, chunk)[0]


def _from_hidden(
    params: PyTree, config: ModelConfig, hidden: Array, tokens: Array, temperature: float, chunk: int
) -> tuple[Array, Array]:
    """Logprobs and entropies [..., N] of tokens [..., N] from states [..., N, D], chunk by chunk."""
    score = functools.partial(_score_chunk, params, config, temperature)
    total = tokens.shape[-1]
    if total <= chunk:
        return jax.checkpoint(score)(hidden, tokens)
    spare = -total % chunk
    pad = [(0, 0)] * (tokens.ndim - 1) + [(0, spare)]
    hidden, tokens = jnp.pad(hidden, [*pad, (0, 0)]), jnp.pad(tokens, pad)
    parts = (total + spare) // chunk
    split = lambda x: jnp.moveaxis(
        x.reshape(*tokens.shape[:-1], parts, chunk, *x.shape[tokens.ndim :]), tokens.ndim - 1, 0
    )
    step = lambda _, xs: (None, jax.checkpoint(score)(*xs))
    _, columns = jax.lax.scan(step, None, (split(hidden), split(tokens)))
    join = lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)[..., :total]
    return join(columns[0]), join(columns[1])


def _score_chunk(params: PyTree, config: ModelConfig, temperature: float, hidden: Array, tokens: Array):
    logits = unembed(params, config, hidden) / temperature
    log_norm = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    mean_logit = jnp.sum(jnp.exp(logits - log_norm[..., None]) * logits, axis=-1)
    return chosen - log_norm, log_norm - mean_logit
