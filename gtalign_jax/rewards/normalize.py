"""Welfare of mixed tasks on one scale: eight normalisers per source (paper section 3, mixed training).

With m_s, sd_s of a source's valid scores, m, sd of all valid scores and n_s the source's count:

    zscore        (x - m_s) / (sd_s + e)
    minmax        (x - min_s) / max(max_s - min_s, e)
    robustz       tanh(z / 2), z = (w - med_s) / (1.4826 MAD_s + e), w = x winsorised to the source's 1-99 %
                  range; a source whose MAD is below e has scale 1
    cdf           2 r / n_s - 1, r = average rank - 1/2 of the tied scores
    quantile      the pooled score at position floor((r + 1/2) / n_s (N - 1)), r = (scores not above x) - 1
    james         (x - mu) / (sqrt(v) + e), mu = k m_s + (1 - k) m, k = n_s / (n_s + 50) and
                  v = k (sd_s + e)^2 + (1 - k) (sd + e)^2
    decentralize  (x - m_s) / (sd + e)
    selfadapt     tanh((x - m_s) / 2)

e = 1e-6; deviations are the population's. Everything is sums, sorts and gathers over the batch axis, so a
batch that is sharded over devices gives the same numbers. Invalid samples take no part and get 0.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gtalign_jax.errors import UserError
from gtalign_jax.types import Array

EPS = 1e-6
SHRINK = 50.0
WINSOR = (0.01, 0.99)
MAD_TO_STD = 1.4826


class Batch(NamedTuple):
    """scores [B] float32 or float64; segment [B] int32, the source, or num_sources where invalid."""

    scores: Array
    segment: Array
    valid: Array
    num_sources: int

    def per_source(self, values: Array) -> Array:
        """Sum [num_sources + 1] of values [B] over each source's valid samples."""
        kept = jnp.where(self.valid, values, 0.0)
        return jax.ops.segment_sum(kept, self.segment, self.num_sources + 1)

    def mean(self, values: Array) -> Array:
        """Mean [B] of values [B] over the valid samples of each sample's source."""
        return (self.per_source(values) / self.count)[self.segment]

    @property
    def count(self) -> Array:
        """Valid samples [num_sources + 1] of each source, at least 1."""
        return jnp.maximum(self.per_source(jnp.ones_like(self.scores)), 1.0)


@functools.partial(jax.jit, static_argnames=("method", "num_sources"))
def normalize_scores(scores: Array, source: Array, valid: Array, method: str, num_sources: int) -> Array:
    """Scores [B] float32 of sources [B] int32 (0 .. num_sources - 1), normalised within each source.

    valid [B] bool: the others take no part and get 0. method: one of METHODS. Returns [B] float32, or
    float64 of float64 scores.
    Raises UserError for an unknown method.
    """
    if method not in METHODS:
        raise UserError(f"normalize.method={method!r}: must be one of {', '.join(METHODS)}")
    scores = jnp.where(valid, scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), 0.0)
    batch = Batch(scores, jnp.where(valid, source, num_sources), valid, num_sources)
    return jnp.where(valid, METHODS[method](batch), 0.0)


def _moments(b: Batch) -> tuple[Array, Array]:
    """Mean and variance [B] of each sample's source; exactly constant sources have variance 0."""
    mean = b.mean(b.scores)
    # One more pass takes the rounding of the first sum off the mean, so that equal scores centre to 0.
    mean += b.mean(b.scores - mean)
    return mean, b.mean((b.scores - mean) ** 2)


def _pooled(b: Batch) -> tuple[Array, Array]:
    """Mean and variance [] of all valid scores."""
    whole = Batch(b.scores, jnp.where(b.valid, 0, 1), b.valid, 1)
    mean, variance = _moments(whole)
    first = jnp.argmax(b.valid)
    return mean[first], variance[first]


def _zscore(b: Batch) -> Array:
    mean, variance = _moments(b)
    return (b.scores - mean) / (jnp.sqrt(variance) + EPS)


def _minmax(b: Batch) -> Array:
    size = b.num_sources + 1
    low = jax.ops.segment_min(b.scores, b.segment, size)[b.segment]
    high = jax.ops.segment_max(b.scores, b.segment, size)[b.segment]
    return (b.scores - low) / jnp.maximum(high - low, EPS)


def _robustz(b: Batch) -> Array:
    low, high = (_quantile(b, b.scores, q) for q in WINSOR)
    kept = jnp.clip(b.scores, low, high)
    median = _quantile(b, kept, 0.5)
    mad = MAD_TO_STD * _quantile(b, jnp.abs(kept - median), 0.5)
    scale = jnp.where(mad < EPS, 1.0, mad)
    return jnp.tanh((kept - median) / (scale + EPS) / 2)


def _cdf(b: Batch) -> Array:
    below, not_above = _ranks(b)
    rank = (below + not_above).astype(b.scores.dtype) / 2
    return 2 * rank / b.count[b.segment] - 1


def _quantile_map(b: Batch) -> Array:
    _, not_above = _ranks(b)
    total = jnp.sum(b.valid)
    # Exact in integers; unsigned 32 bits hold it up to 46 000 samples of one source.
    size = b.count[b.segment].astype(jnp.uint32) * 2
    place, steps = (2 * not_above - 1).astype(jnp.uint32), (jnp.maximum(total, 1) - 1).astype(jnp.uint32)
    index = place * (steps // size) + place * (steps % size) // size
    pooled = jnp.sort(jnp.where(b.valid, b.scores, jnp.inf))
    return pooled[jnp.minimum(index, steps)]


def _james(b: Batch) -> Array:
    mean, variance = _moments(b)
    pooled_mean, pooled_variance = _pooled(b)
    count = b.count[b.segment]
    own = count / (count + SHRINK)
    centre = pooled_mean + own * (mean - pooled_mean)  # exact when both are equal
    spread = own * (jnp.sqrt(variance) + EPS) ** 2 + (1 - own) * (jnp.sqrt(pooled_variance) + EPS) ** 2
    return (b.scores - centre) / (jnp.sqrt(spread) + EPS)


def _decentralize(b: Batch) -> Array:
    return (b.scores - _moments(b)[0]) / (jnp.sqrt(_pooled(b)[1]) + EPS)


def _selfadapt(b: Batch) -> Array:
    return jnp.tanh((b.scores - _moments(b)[0]) / 2)


def _sorted(b: Batch, values: Array) -> tuple[Array, Array, Array]:
    """(values by source then size, the rows they came from, where each source starts)."""
    rows = jnp.arange(len(values))
    _, ordered, rows = jax.lax.sort((b.segment, values, rows), num_keys=2)
    sizes = jax.ops.segment_sum(jnp.ones_like(rows), b.segment, b.num_sources + 1)
    return ordered, rows, jnp.cumsum(sizes) - sizes


def _quantile(b: Batch, values: Array, q: float) -> Array:
    """The q-quantile [B] of values in each sample's source, interpolated linearly."""
    ordered, _, starts = _sorted(b, values)
    place = q * (b.count - 1)
    low = jnp.floor(place)

    def at(i: Array) -> Array:
        return ordered[jnp.minimum(starts + i.astype(jnp.int32), len(values) - 1)]

    between = at(low) + (place - low) * (at(jnp.ceil(place)) - at(low))
    return between[b.segment]


def _ranks(b: Batch) -> tuple[Array, Array]:
    """Scores of the same source below, and not above, each sample: int32 [B] each."""
    ordered, rows, starts = _sorted(b, b.scores)
    segment = b.segment[rows]
    place = jnp.arange(len(rows))
    new = jnp.concatenate([jnp.ones(1, bool), (ordered[1:] != ordered[:-1]) | (segment[1:] != segment[:-1])])
    first = jax.lax.cummax(jnp.where(new, place, 0))
    ends = jnp.concatenate([new[1:], jnp.ones(1, bool)])
    last = jax.lax.cummin(jnp.where(ends, place, len(rows)), reverse=True)

    def back(x: Array) -> Array:
        return jnp.zeros_like(x).at[rows].set(x - starts[segment])

    return back(first), back(last + 1)


METHODS: dict[str, Callable[[Batch], Array]] = {
    "none": lambda b: b.scores,
    "zscore": _zscore,
    "minmax": _minmax,
    "robustz": _robustz,
    "cdf": _cdf,
    "quantile": _quantile_map,
    "james": _james,
    "decentralize": _decentralize,
    "selfadapt": _selfadapt,
}
