"""The published comparison of two rollout files, defects included (`analyze --reference`).

Points are the last (user, llm) rewards of every input that both files hold. Ranges, and with them the
reference point of the area, come from both files together; coverage and regret are in scaled units.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gtalign_jax.game import pareto

FLOOR = 1e-9
NAMES = ("file1", "file2")


def load(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Points by stripped input; a repeated input keeps its last. KeyError if a row lacks a field."""
    return {str(r["input"]).strip(): (float(r["user_reward"]), float(r["llm_reward"])) for r in rows}


def compare(
    a: Iterable[Mapping[str, Any]], b: Iterable[Mapping[str, Any]], eps: float = 0.05, alpha: float = 0.5
) -> dict[str, Any]:
    """The published numbers on rows with `input`, `user_reward` and `llm_reward`, under their names.

    KeyError: a row lacks a field. ValueError: the files share no input.
    """
    first, second = load(a), load(b)
    common = [key for key in first if key in second]
    if not common:
        raise ValueError("no common input")
    sets = {
        name: np.array([points[k] for k in common])
        for name, points in zip(NAMES, (first, second), strict=True)
    }
    low, high = both(sets).min(0), both(sets).max(0)
    span = np.where(high > low, high - low, 1.0)
    scaled = {name: (points - low) / span for name, points in sets.items()}
    regrets = _regrets(scaled)
    return {
        "basic_compare": _basic_compare(sets[NAMES[0]], sets[NAMES[1]], eps),
        "ranges": {"u_min": low[0], "u_max": high[0], "l_min": low[1], "l_max": high[1]},
        "epsilon": eps,
        "epsilon_coverage": {name: float(np.mean(r <= eps)) for name, r in regrets.items()},
        "avg_regret_Linf": {name: float(np.mean(r)) for name, r in regrets.items()},
        "hypervolume_ref_(u_min,l_min)": {name: first_rectangle(p, low) for name, p in sets.items()},
        "social_welfare_alpha": alpha,
        "NSW_avg": {name: _welfare(p, 0.5) for name, p in sets.items()},
        "CobbDouglas_avg": {name: _welfare(p, alpha) for name, p in sets.items()},
        "coverage_spread": {name: _spread(p, low, high) for name, p in sets.items()},
    }


def both(sets: Mapping[str, np.ndarray]) -> np.ndarray:
    """All points [2n, 2]."""
    return np.concatenate(list(sets.values()))


def _dominates(p: np.ndarray, q: np.ndarray, eps: float) -> np.ndarray:
    """Mask [n]: with eps > 0 equal points dominate each other."""
    return np.all(p >= q - eps, axis=1) & np.any(p > q - eps, axis=1)


def _basic_compare(a: np.ndarray, b: np.ndarray, eps: float) -> dict[str, int]:
    """Pairs counted by who dominates; mutual dominance counts as incomparable."""
    over, under = _dominates(a, b, eps), _dominates(b, a, eps)
    equal = ~over & ~under & np.all(a == b, axis=1)
    return {
        "common_count": len(a),
        "file1_dominates_file2": int(np.sum(over & ~under)),
        "file2_dominates_file1": int(np.sum(under & ~over)),
        "equal": int(np.sum(equal)),
        "incomparable": int(np.sum(~(over ^ under) & ~equal)),
    }


def _regrets(scaled: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """L-infinity regret [n] of every scaled point to the joint frontier."""
    front = pareto.frontier_points(both(scaled))
    return {name: pareto.regret(points, front) for name, points in scaled.items()}


def first_rectangle(points: np.ndarray, low: np.ndarray) -> float:
    """The published area: only the box of the frontier point with the largest user reward."""
    best = pareto.frontier_points(points)[-1]
    return float(np.prod(best - low))


def _welfare(points: np.ndarray, alpha: float) -> float:
    """Mean of (U + 1e-9)^alpha (L + 1e-9)^(1 - alpha), losses counted as 0."""
    user, llm = (np.maximum(points, 0.0) + FLOOR).T
    return float(np.mean(user**alpha * llm ** (1.0 - alpha)))


def _spread(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, float]:
    """Share of each range that the set spans, 0 where the range is empty."""
    span = high - low
    share = np.where(span > 0, np.ptp(points, axis=0) / np.where(span > 0, span, 1.0), 0.0)
    return {"u_cov": float(share[0]), "l_cov": float(share[1]), "mean_cov": float(share.mean())}
