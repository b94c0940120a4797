"""The eight published per-source normalisers, in the precisions they really run in.

Scores stay float64 while most statistics of a source are float32, so the mean of equal scores is not quite
those scores, and ties fall beside their own rank. Where the published code raises (`zscore`, `minmax`),
this is what its formula gives.
"""

from collections.abc import Callable, Sequence

import numpy as np

EPS = 1e-6

# (scores of one source [n] float64, all scores of the batch [B] float64) → normalised [n] float64
Method = Callable[[np.ndarray, np.ndarray], np.ndarray]


def normalize(scores: Sequence[float], sources: Sequence[str], method: str) -> np.ndarray:
    """Scores [B], each normalised within its source as the published code does, float64 [B].

    NaN spreads through its source. Raises KeyError for a method that is not in METHODS.
    """
    function, pooled = METHODS[method], np.asarray(scores, np.float64)
    labels = np.asarray(sources)
    out = np.zeros(len(pooled))
    for source in dict.fromkeys(sources):
        mine = labels == source
        with np.errstate(invalid="ignore", over="ignore"):
            out[mine] = function(pooled[mine], pooled)
    return out


def _zscore(x: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    mean, std = _stats32(x)
    return (x - mean) / (std + EPS if std >= EPS else 1.0)


def _minmax(x: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    low, high = float(np.float32(x.min())), float(np.float32(x.max()))
    return (x - low) / (high - low) if high - low >= EPS else np.zeros_like(x)


def _robustz(x: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """tanh(z / 2) of the winsorised score, z by median and MAD; all statistics are float32."""
    single = x.astype(np.float32)
    low, high = np.percentile(single, [1, 99]).astype(np.float32)
    clipped = np.clip(single, low, high)
    median = float(np.median(clipped))
    scale = 1.4826 * float(np.median(np.abs(clipped - median)))
    return np.tanh((np.clip(x, low, high) - median) / (scale if scale >= EPS else 1.0) / 2)


def _cdf(x: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """2 rank - 1 with mid-ranks of ties; float64 scores are interpolated between float32 steps."""
    steps, counts = np.unique(x.astype(np.float32), return_counts=True)
    return 2 * np.interp(x, steps, (np.cumsum(counts) - counts / 2) / len(x)) - 1


def _quantile(x: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """The pooled score at the same quantile; no interpolation between pooled scores."""
    positions = (np.arange(len(x)) + 0.5) / len(x)
    rank = np.interp(x, np.sort(x.astype(np.float32)), positions)
    return np.quantile(pooled.astype(np.float32), rank, method="lower")


def _james(x: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """Mean and variance shrunk toward the pooled ones with weight n / (n + 50) on the source's own."""
    own = len(x) / (len(x) + 50)
    (mean, std), (all_mean, all_std) = _stats32(x), _stats32(pooled)
    variance = own * (std + EPS) ** 2 + (1 - own) * (all_std + EPS) ** 2
    return (x - (own * mean + (1 - own) * all_mean)) / (np.sqrt(variance) + EPS)


def _decentralize(x: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """The float64 mean taken off, over the float32 pooled deviation."""
    return (x - x.mean()) / (_stats32(pooled)[1] + EPS)


def _selfadapt(x: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    return np.tanh((x - x.mean()) / 2)


def _stats32(x: np.ndarray) -> tuple[float, float]:
    """Mean and population deviation, computed in float32."""
    single = x.astype(np.float32)
    return float(single.mean()), float(single.std())


METHODS: dict[str, Method] = {
    "zscore": _zscore,
    "minmax": _minmax,
    "robustz": _robustz,
    "cdf": _cdf,
    "quantile": _quantile,
    "james": _james,
    "decentralize": _decentralize,
    "selfadapt": _selfadapt,
}
