"""Hypervolumes of several point sets of the same prompts, drawn again together."""

import math
from collections.abc import Sequence

import numpy as np

from gtalign_jax.evaluation.bootstrap import Estimate
from gtalign_jax.game import pareto


def resampled_areas(
    sets: Sequence[np.ndarray], reference: tuple[float, float], n_boot: int, seed: int
) -> tuple[list[float], np.ndarray]:
    """(the hypervolume of each set [n, 2], those of its resamples [sets, n_boot]).

    The i-th points of all sets belong together and are drawn together. A resample's area never exceeds the
    whole set's.
    """
    rng = np.random.default_rng(seed)
    n, drawn = len(sets[0]), []
    for rows in np.array_split(np.arange(n_boot), math.ceil(n_boot * n / 2_000_000)):  # bounds memory
        member = np.zeros((len(rows), n), bool)
        member[np.arange(len(rows))[:, None], rng.integers(n, size=(len(rows), n))] = True
        drawn.append([pareto.hypervolumes(points, member, reference) for points in sets])
    return [pareto.hypervolume(points, reference) for points in sets], np.concatenate(drawn, axis=1)


def percentile_estimate(whole: float, drawn: np.ndarray, n: int) -> Estimate:
    """A value with the 95 % interval of its resamples [n_boot]."""
    lo, hi = np.percentile(drawn, [2.5, 97.5])
    return {"mean": whole, "lo": float(lo), "hi": float(hi), "n": n}
