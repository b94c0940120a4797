"""At which price a pricing policy changes the recommended action: exact, on host float64 NumPy.

All policies here are linear in the price, so each payoff is a line b + p s. A recommendation (`game.payoff`)
compares payoffs and products of gains: it can change only where two lines of a player meet, where one
meets the floor, or where two products, quadratic in p, are equal. Between two such prices it is constant, so
one look between each pair of neighbours finds every flip.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from gtalign_jax.errors import UserError
from gtalign_jax.game.moves import LLM, USER
from gtalign_jax.game.payoff import choose
from gtalign_jax.game.pricing import SCALE, STEP, as_written

Edit = Callable[[np.ndarray, float], np.ndarray]
_choose = jax.jit(choose)
_APART = 1e-6  # prices closer than this are one: the choice is decided in float32


class Flip(NamedTuple):
    """At `price` the recommendation goes from action `before` to action `after`."""

    price: float
    before: int
    after: int


def break_even(
    payoff: np.ndarray,
    edit: Edit,
    actions: Sequence[int] | None = None,
    written: bool = False,
    step: float = STEP,
) -> tuple[Flip, ...]:
    """Every flip of the recommended action as the price rises from 0, in order of the price.

    payoff [U, A, 2]. edit: (payoff, price) -> payoff, linear in the price above 0, or UserError. actions:
    as if the assistant had these alone, such as a pair of them (None: all). written: of the matrix as models
    read it, clipped to the scale and rounded to `step`; the flip is then where a rounding tips.
    A flip at price 0 is an edit that is no edit at 0 alone (the published script's).
    """
    chosen = list(range(payoff.shape[1]) if actions is None else actions)
    whole = np.asarray(payoff, np.float64)
    base, slope = (part[:, chosen] for part in _lines(whole, edit))
    prices = _candidates(base, slope, step if written else None)
    between = (
        np.append((np.append(0.0, prices[:-1]) + prices) / 2, prices[-1] + 1.0) if len(prices) else [1.0]
    )
    seen = base + np.multiply.outer(between, slope)
    seen = np.concatenate([whole[None, :, chosen], seen])
    best = _choices(as_written(seen, step) if written else seen)
    at = np.concatenate([[0.0], prices])
    return tuple(
        Flip(float(at[i]), chosen[best[i]], chosen[best[i + 1]])
        for i in range(len(at))
        if best[i] != best[i + 1]
    )


def _choices(payoffs: np.ndarray) -> np.ndarray:
    """The action [n] of each of n matrices, in few shapes so that few programs are compiled."""
    count = len(payoffs)
    room = max(128, 1 << (count - 1).bit_length())
    return np.asarray(_choose(np.pad(payoffs, [(0, room - count), *[(0, 0)] * 3])))[:count]


def _lines(payoff: np.ndarray, edit: Edit) -> tuple[np.ndarray, np.ndarray]:
    """(base, slope), both [U, A, 2], of a linear edit."""
    one, two, nine = (np.asarray(edit(payoff, price), np.float64) for price in (1.0, 2.0, 9.0))
    slope = two - one
    if not np.allclose(nine, one + 8 * slope, atol=1e-6):
        raise UserError("the pricing policy is not linear in its price, so its break-even is not computed")
    return one - slope, slope


def _candidates(base: np.ndarray, slope: np.ndarray, step: float | None) -> np.ndarray:
    """All prices above 0, ascending, at which the choice may change; step: of roundings, None for none."""
    b, s = base.reshape(-1, 2), slope.reshape(-1, 2)
    found = _crossings(b, s) if step is None else _roundings(b, s, step)
    found = np.sort(found[np.isfinite(found) & (found > _APART)])
    return found[np.diff(found, prepend=0.0) > _APART * (1.0 + found)]


def _roundings(b: np.ndarray, s: np.ndarray, step: float) -> np.ndarray:
    """Where a payoff passes the middle between two steps of the scale."""
    edges = np.arange(SCALE[0] + step / 2, SCALE[1], step)
    return _divide(edges[:, None, None] - b, s).reshape(-1)


def _crossings(b: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Where two cells have an equal payoff or an equal product of gains, or one meets the floor."""
    first, second = np.triu_indices(len(b), 1)
    equal = _divide(b[second] - b[first], s[first] - s[second])
    floor = _divide(SCALE[0] - b, s)
    gain = b - SCALE[0]
    # gain_LLM gain_user as c0 + c1 p + c2 p^2
    product = np.stack(
        [
            gain[:, LLM] * gain[:, USER],
            gain[:, LLM] * s[:, USER] + gain[:, USER] * s[:, LLM],
            s[:, LLM] * s[:, USER],
        ]
    )
    return np.concatenate(
        [equal.reshape(-1), floor.reshape(-1), _roots(*(product[:, first] - product[:, second]))]
    )


def _roots(c0: np.ndarray, c1: np.ndarray, c2: np.ndarray) -> np.ndarray:
    """Real roots of c0 + c1 p + c2 p^2, by the form that loses no digits; NaN for one that is not there."""
    with np.errstate(invalid="ignore"):
        root = np.sqrt(c1**2 - 4 * c0 * c2)
    q = -(c1 + np.where(c1 < 0, -root, root)) / 2
    return np.concatenate([_divide(q, c2), _divide(c0, q)])


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.broadcast_shapes(a.shape, b.shape), np.nan), where=b != 0)
