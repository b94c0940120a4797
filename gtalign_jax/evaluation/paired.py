"""Differences between two methods on the same prompts, over several seeds, and several of them at once."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Line = Mapping[str, Any]


class Difference(NamedTuple):
    """first - second: mean, 95 % interval, two-sided p, seeds and prompts behind it."""

    mean: float
    lo: float
    hi: float
    p: float
    seeds: int
    prompts: int


def by_prompt(runs: Sequence[Sequence[Line]], metric: str) -> list[dict[str, float]]:
    """Of each seed's lines, {prompt: mean of the metric}; lines without it count nowhere."""
    found = []
    for lines in runs:
        values: dict[str, list[float]] = {}
        for line in lines:
            if line.get(metric) is not None:
                values.setdefault(line["input"], []).append(float(line[metric]))
        found.append({prompt: float(np.mean(each)) for prompt, each in values.items()})
    return found


def paired_difference(
    first: Sequence[Sequence[Line]],
    second: Sequence[Sequence[Line]],
    metric: str,
    *,
    n_boot: int = 4000,
    seed: int = 0,
) -> Difference:
    """The mean difference of a metric between two methods' runs, one a seed, on the prompts that all share.

    Prompts and seeds are both drawn again with replacement (a crossed bootstrap, Owen 2007), so that neither
    few prompts nor few seeds pass for certainty; one seed says nothing about others. p is twice the smaller
    share of draws on one side of 0. Methods of one seed each or of different numbers of seeds are
    compared by their means over seeds. NaN without a shared prompt.
    """
    sides = [by_prompt(runs, metric) for runs in (first, second)]
    shared = sorted(set.intersection(*(set(run) for side in sides for run in side)))
    if not shared:
        return Difference(math.nan, math.nan, math.nan, math.nan, seeds=0, prompts=0)
    a, b = (np.array([[run[prompt] for prompt in shared] for run in side]) for side in sides)
    rng = np.random.default_rng(seed)
    drawn = np.empty(n_boot)
    for i in range(n_boot):
        prompts = rng.integers(len(shared), size=len(shared))
        rows_a, rows_b = (rng.integers(len(x), size=len(x)) for x in (a, b))
        if len(a) == len(b):
            rows_b = rows_a  # runs of one seed start from one draw of batches: they are pairs
        drawn[i] = a[rows_a].mean(axis=0)[prompts].mean() - b[rows_b].mean(axis=0)[prompts].mean()
    lo, hi = np.percentile(drawn, [2.5, 97.5])
    smaller = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2.0 * (smaller + 1) / (n_boot + 1))
    return Difference(float(a.mean() - b.mean()), float(lo), float(hi), p, min(len(a), len(b)), len(shared))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: all of them at 0.05 err together at most that often."""
    order = np.argsort(p_values)
    n, adjusted, highest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (n - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def cohens_kappa(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Agreement of two judges on the same answers beyond chance, (p_o - p_e) / (1 - p_e).

    NaN where both always say one and the same. ValueError for different numbers of verdicts.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} verdicts against {len(second)}")
    labels = sorted({*first, *second})
    count = np.zeros((len(labels), len(labels)))
    for a, b in zip(first, second, strict=True):
        count[labels.index(a), labels.index(b)] += 1
    share = count / max(count.sum(), 1.0)
    seen, chance = np.trace(share), float(share.sum(axis=1) @ share.sum(axis=0))
    return float((seen - chance) / (1.0 - chance)) if chance < 1.0 else float("nan")
