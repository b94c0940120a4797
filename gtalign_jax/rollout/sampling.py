"""From logits to a token: exact categorical sampling with one uniform number per row.

    p      = softmax(processed(logits))           temperature, top-k, top-p, min-p
    token  = min { v : p_0 + ... + p_v > u }      u uniform on [0, 1): the inverse CDF

The sum is searched in two levels (sums of blocks, then inside one block), so that no array of V
running sums is made. The uniform of a token is a function of (step key, row, t) alone: neither the
bucket, nor the mesh, nor the other rows of the batch change what a row draws.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from gtalign_jax.errors import INF, MAX_COUNT, in_range
from gtalign_jax.types import Array, Completions

BLOCK = 128
# What logits are divided by stays where float32 logits do not overflow or vanish.
EXTREMES = (1e-5, 1e5)

# Stands for minus infinity where its product with a probability of zero must be zero and not undefined.
FAR_BELOW = -1e30
MIN_TEMPERATURE = 1e-6  # logits over a smaller one are past float32


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """The distribution a token is drawn from; the filters apply in the order of the fields.

    repetition_penalty r: a logit of a token already in the prompt or completion is divided by r when
    positive, multiplied by r when negative (1: off). temperature: 0 is greedy and switches the filters
    off. top_k: keep the k largest logits, ties with the k-th included (0: off). top_p: keep the
    smallest set of largest probabilities whose mass reaches top_p, ties with its smallest included
    (1: off). min_p: keep tokens with at least min_p times the largest probability (0: off).
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        r, t = self.repetition_penalty, self.temperature
        low, high = EXTREMES
        span = f"from {low:g} to {high:g}"
        limits = (
            ("repetition_penalty", r > 0, "positive"),
            ("repetition_penalty", low <= r <= high, span),
            ("temperature", t >= 0, "0 (greedy) or positive"),
            ("temperature", t == 0 or low <= t <= high, f"0 (greedy) or {span}"),
            ("top_k", self.top_k >= 0, "0 (off) or positive"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
        )
        for name, ok, message in limits:
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)}: must be {message}")
        in_range(self, repetition_penalty=(0, INF), temperature=(0, INF), top_k=(0, MAX_COUNT))
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature}: must be 0 (greedy) or at least {MIN_TEMPERATURE:g}"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filters(self) -> bool:
        """Whether top-k, top-p or min-p leave tokens out."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)


GREEDY = SamplingConfig(temperature=0.0)


def processed_logits(logits: Array, config: SamplingConfig, seen: Array | None = None) -> Array:
    """The logits [..., V] float32 whose softmax tokens are drawn from; removed tokens are -inf.

    seen [..., V] bool: tokens that the repetition penalty applies to. Greedy decoding applies the
    penalty only.
    """
    logits = logits.astype(jnp.float32)
    if config.repetition_penalty != 1 and seen is not None:
        r = config.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / r, logits * r), logits)
    if config.greedy:
        return logits
    logits = logits / config.temperature
    threshold = _threshold(logits, config)
    return logits if threshold is None else jnp.where(logits >= threshold, logits, -jnp.inf)


def drawn_tokens(completions: Completions) -> Array:
    """What `filtered_logits` is told [P, G, N] int32: 1 + the token of an action, 0 where none was drawn."""
    return jnp.where(completions.action_mask, completions.tokens + 1, 0)


def filtered_logits(config: SamplingConfig, drawn: Array, logits: Array) -> Array:
    """The filters of `processed_logits` for a loss, on logits [..., V] that the temperature has divided.

    drawn [...]: of `drawn_tokens`. A token that was drawn stays, be it that rounding, or an update since, put
    it below the threshold: its probability is then small, and not zero. Nothing is left out where none was.
    """
    token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) + 1
    threshold = _threshold(logits, config)
    if threshold is None:  # as with a top_k beyond the vocabulary
        return logits
    kept = (logits >= threshold) | (token == drawn[..., None]) | (drawn[..., None] == 0)
    return jnp.where(kept, logits, FAR_BELOW)


def _threshold(logits: Array, config: SamplingConfig) -> Array | None:
    """The smallest logit [..., 1] that top-k, top-p and min-p keep; None when all are off."""
    vocab = logits.shape[-1]
    k = min(config.top_k or vocab, vocab)
    bounds = []
    if k < vocab or config.top_p < 1:
        largest = jax.lax.top_k(logits, k)[0] if k < vocab else -jnp.sort(-logits, axis=-1)
        bounds.append(largest[..., -1:])
        if config.top_p < 1:
            bounds.append(_smallest_kept(largest, config.top_p))
    if config.min_p > 0:
        bounds.append(jnp.max(logits, axis=-1, keepdims=True) + math.log(config.min_p))
    return jnp.stack(bounds).max(axis=0) if bounds else None


def _smallest_kept(largest: Array, top_p: Array | float) -> Array:
    """The smallest [..., 1] of the logits `largest` [..., n], largest first, that top_p keeps.

    A token stays while the mass before it is below top_p, so the first always stays.
    """
    p = jax.nn.softmax(largest, axis=-1)
    kept = jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, largest, jnp.inf)
    return jnp.min(kept, axis=-1, keepdims=True)


def sample_token(
    uniform: Array, logits: Array, config: SamplingConfig, seen: Array | None = None
) -> tuple[Array, Array]:
    """Draw one token a row.

    uniform [...] float32 in [0, 1]; logits [..., V]; seen as in `processed_logits`.
    Returns token [...] int32 and its log-probability [...] float32 under the distribution it was drawn
    from (greedy: under the softmax at temperature 1). A token of probability zero is never drawn.
    """
    logits = processed_logits(logits, config, seen)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    blocks = _split_in_blocks(jnp.exp(logits - largest))
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32) if config.greedy else _inverse(blocks, uniform)
    total = jnp.sum(jnp.sum(blocks, axis=-1), axis=-1)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)
    return token, (chosen - largest)[..., 0] - jnp.log(total)


def sample_each(uniform: Array, logits: Array, temperature: Array, top_p: Array) -> tuple[Array, Array]:
    """`sample_token` where every row has its own temperature [...] and top_p [...], both traced.

    The log-probability returned is the model's own, of logits before temperature and filter.
    """
    logits = logits.astype(jnp.float32)
    greedy = temperature == 0
    heated = logits / jnp.where(greedy, 1.0, temperature)[..., None]
    kept = jax.lax.cond(jnp.any((top_p < 1) & ~greedy), _nucleus, lambda x, _: x, heated, top_p)
    blocks = _split_in_blocks(jnp.exp(kept - jnp.max(kept, axis=-1, keepdims=True)))
    token = jnp.where(greedy, jnp.argmax(logits, axis=-1).astype(jnp.int32), _inverse(blocks, uniform))
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def most_likely(logits: Array, count: int) -> tuple[Array, Array]:
    """The `count` likeliest tokens [..., count] int32 of logits [..., V], and their log-probabilities."""
    values, tokens = jax.lax.top_k(logits.astype(jnp.float32), count)
    return tokens, values - jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1, keepdims=True)


def _nucleus(logits: Array, top_p: Array) -> Array:
    """The logits [..., V] that top_p [...] keeps; the others are -inf."""
    largest = -jnp.sort(-logits, axis=-1)
    return jnp.where(logits >= _smallest_kept(largest, top_p[..., None]), logits, -jnp.inf)


def row_keys(key: Array, row: Array) -> Array:
    """One key a row: fold_in(step key, row). row: int32 of any shape."""
    fold = jax.random.fold_in
    for _ in range(row.ndim):
        fold = jax.vmap(fold, in_axes=(None, 0))
    return fold(key, row)


def token_uniform(keys: Array, t: Array) -> Array:
    """The uniform of each row's token number t, on [0, 1): keys of any shape from `row_keys`, t int32 [] or
    of their shape."""

    def draw(key: Array, t: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, t), dtype=jnp.float32)

    for _ in range(keys.ndim):
        draw = jax.vmap(draw, in_axes=(0, 0 if jnp.ndim(t) else None))
    return draw(keys, t)


def _split_in_blocks(mass: Array) -> Array:
    """[..., V] -> [..., ceil(V / BLOCK), BLOCK], padded with zeros."""
    spare = -mass.shape[-1] % BLOCK
    if spare:
        mass = jnp.pad(mass, [(0, 0)] * (mass.ndim - 1) + [(0, spare)])
    return mass.reshape(*mass.shape[:-1], -1, BLOCK)


def _inverse(blocks: Array, uniform: Array) -> Array:
    """The token [...] int32 at `uniform` of the mass in blocks [..., blocks, BLOCK]."""
    block_mass = jnp.sum(blocks, axis=-1)
    total = jnp.sum(block_mass, axis=-1)
    block, before = _invert(block_mass, uniform * total)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    offset, _ = _invert(inside, uniform * total - before)
    return block * BLOCK + offset


def _invert(mass: Array, target: Array) -> tuple[Array, Array]:
    """The first index whose running sum exceeds the target, among those with positive mass.

    mass [..., n] >= 0; target [...]. Returns the index [...] int32 and the sum before it [...]. The
    last index with positive mass when rounding, or u = 1, leaves the target beyond every sum.
    """
    running = jnp.cumsum(mass, axis=-1)
    positive = mass > 0
    beyond = positive & (running > target[..., None])
    last = mass.shape[-1] - 1 - jnp.argmax(positive[..., ::-1], axis=-1)
    index = jnp.where(jnp.any(beyond, axis=-1), jnp.argmax(beyond, axis=-1), last).astype(jnp.int32)
    before = jnp.take_along_axis(running - mass, index[..., None], axis=-1)[..., 0]
    return index, before
