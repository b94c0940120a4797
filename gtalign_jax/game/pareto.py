"""Metrics over point sets [n, 2] of (user, llm) rewards, larger is better: exact, on host float64 NumPy.

Nothing is scaled by the range of the data, so `eps`, regret and area are in units of reward (of reward
squared for the area) and a set's area does not change with the set it is compared with.
"""

import numpy as np
from numpy.typing import ArrayLike

COMPARISONS = ("a_dominates", "b_dominates", "equal", "incomparable")


def as_points(points: ArrayLike) -> np.ndarray:
    """`points` as finite float64 [n, 2]. ValueError on any other shape or a value that is not finite."""
    found = np.asarray(points, np.float64)
    if found.size == 0:
        return found.reshape(0, 2)
    if found.ndim != 2 or found.shape[1] != 2:
        raise ValueError(f"points must have the shape [n, 2], got {list(found.shape)}")
    if not np.isfinite(found).all():
        raise ValueError("points must be finite")
    return found


def frontier(points: ArrayLike) -> np.ndarray:
    """Mask [n] of the points that none dominates; O(n log n), for many points (`game.payoff.pareto_frontier`
    compares the few cells of each of many matrices).

    A point dominates another when it is no worse for both players and better for one, so equal points
    are on the frontier together.
    """
    found = as_points(points)
    distinct, back = np.unique(found, axis=0, return_inverse=True)
    # In ascending (user, llm) order a point is dominated by a later one that is as good for the LLM.
    later = np.maximum.accumulate(distinct[::-1, 1])[::-1]
    best = np.append(later[1:], -np.inf)
    return (distinct[:, 1] > best)[back.reshape(-1)]


def frontier_points(points: ArrayLike) -> np.ndarray:
    """The distinct frontier points [k, 2], in ascending user order (so descending llm order)."""
    found = as_points(points)
    return np.unique(found[frontier(found)], axis=0)


def hypervolume(points: ArrayLike, reference: tuple[float, float]) -> float:
    """Area of the union of the boxes from `reference` (user, llm) to each point; exact in two dimensions.

    A point that is not better than the reference for both players adds nothing.
    """
    found = as_points(points)
    best = frontier_points(found[np.all(found > reference, axis=1)])
    left = np.concatenate([[reference[0]], best[:-1, 0]])
    return float(np.sum((best[:, 0] - left) * (best[:, 1] - reference[1])))


def hypervolumes(points: ArrayLike, member: np.ndarray, reference: tuple[float, float]) -> np.ndarray:
    """`hypervolume` [r] of r subsets of the points [n, 2], given as masks `member` [r, n]."""
    found = np.maximum(as_points(points), reference)
    order = np.argsort(-found[:, 0], kind="stable")
    user, llm = found[order].T
    # Right to left in strips between neighbouring user values: a strip is as high as the best so far.
    heights = np.where(member[:, order], llm - reference[1], 0.0)
    widths = user - np.append(user[1:], reference[0])
    return np.maximum.accumulate(heights, axis=1) @ widths


def regret(points: ArrayLike, front: ArrayLike) -> np.ndarray:
    """L-infinity regret [n]: the smallest t such that p + (t, t) is at least as good as a front point.

    min over f in `front` [k, 2] of max(f_user - p_user, f_llm - p_llm, 0); zero on and beyond the front.
    ValueError if the front is empty.
    """
    found, best = as_points(points), as_points(front)
    if not len(best):
        raise ValueError("the front has no point")
    nearest = np.full(len(found), np.inf)
    for f in np.unique(best, axis=0):  # frontiers are short; this keeps memory at O(n)
        nearest = np.minimum(nearest, np.max(f - found, axis=1))
    return np.maximum(nearest, 0.0)


def within(points: ArrayLike, front: ArrayLike, eps: float) -> np.ndarray:
    """Mask [n] of the points whose regret to `front` is at most `eps`."""
    # The slack keeps a point that is exactly eps away, for the decimals that floats cannot hold.
    return regret(points, front) <= eps + 1e-12


def coverage(points: ArrayLike, front: ArrayLike, eps: float) -> float:
    """Epsilon-coverage: the share of the points within `eps` of `front`; NaN without points."""
    covered = within(points, front, eps)
    return float(np.mean(covered)) if len(covered) else float("nan")


def compare(a: ArrayLike, b: ArrayLike, eps: float = 0.0) -> dict[str, np.ndarray]:
    """How each point of a [n, 2] stands to its partner in b [n, 2]: a mask [n] under each of COMPARISONS.

    a dominates b when it is better by more than `eps` for one player and no worse by more than `eps` for
    the other; equal: within `eps` for both; incomparable: each is better by more than `eps` for one.
    Exactly one of the four holds, for every eps >= 0; eps = 0 is strict Pareto dominance.
    """
    first, second = as_points(a), as_points(b)
    if first.shape != second.shape:
        raise ValueError(f"as many points on both sides, got {len(first)} and {len(second)}")
    gain = first - second
    better = np.any(gain > eps + 1e-12, axis=1)
    worse = np.any(gain < -eps - 1e-12, axis=1)
    masks = (better & ~worse, worse & ~better, ~better & ~worse, better & worse)
    return dict(zip(COMPARISONS, masks, strict=True))


def dominance_counts(a: ArrayLike, b: ArrayLike, eps: float = 0.0) -> dict[str, int]:
    """Number of pairs under each of COMPARISONS; they add up to n."""
    return {name: int(mask.sum()) for name, mask in compare(a, b, eps).items()}


def welfare(points: ArrayLike, alpha: float = 0.5) -> np.ndarray:
    """Cobb-Douglas welfare user^alpha llm^(1 - alpha) [n]; losses count as 0. alpha = 1/2 is Nash's."""
    user, llm = np.maximum(as_points(points), 0.0).T
    return user**alpha * llm ** (1.0 - alpha)


def cobb_douglas_average(points: ArrayLike, alpha: float) -> float:
    """Mean Cobb-Douglas welfare; NaN without points."""
    values = welfare(points, alpha)
    return float(np.mean(values)) if len(values) else float("nan")


def nash_average(points: ArrayLike) -> float:
    """Mean Nash welfare sqrt(user llm); NaN without points."""
    return cobb_douglas_average(points, 0.5)
