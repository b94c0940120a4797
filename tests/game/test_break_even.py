"""Break-even prices: those of a hand-worked game, and every flip that a fine scan of prices finds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtalign_jax.errors import UserError
from gtalign_jax.game.break_even import break_even
from gtalign_jax.game.payoff import cell_welfare, choose
from gtalign_jax.game.pricing import POLICIES, STEPS, Amounts, apply_policy, as_written

AMOUNTS = Amounts(tokens=(0.9, 0.2, 1.3), characters=(1.0, 0.3, 1.1), seconds=(2.0, 0.5, 2.0))
PRICED = sorted(set(POLICIES) - {"none"})
TWO = np.full((2, 3, 2), -5.0)
TWO[1, 0], TWO[1, 1] = (2.0, 3.0), (2.0, 2.0)  # gains: a direct answer 7 x 8, a question 7 x 7


def priced(policy):
    return lambda payoff, price: apply_policy(payoff, policy, price, AMOUNTS)


def test_a_hand_worked_flip():
    """7 (8 - 0.9 p) = 7 (7 - 0.2 p) at p = 1 / 0.7; the question then wins until both are worth nothing."""
    flips = break_even(TWO, priced("per_token"))
    assert flips[0].price == pytest.approx(1 / 0.7, rel=1e-12)
    assert flips[0][1:] == (0, 1)


def test_a_hand_worked_flip_of_products_with_two_changing_factors():
    """The LLM pays for text too: (7 - p)(8 - p) = (7 - p/4)(7 - p/4) at p = (11.5 - sqrt(106)) / 1.875."""
    flips = break_even(TWO, lambda m, p: apply_policy(apply_policy(m, "per_token", p), "subscription", p))
    assert flips[0].price == pytest.approx((11.5 - np.sqrt(106)) / 1.875, rel=1e-12)


def test_as_written_the_flip_is_where_a_rounding_tips():
    """Gains 8 - r(0.9 p) and 7 - r(0.2 p) flip when 1.35 is rounded up and 0.3 is not."""
    flips = break_even(TWO, priced("per_token"), written=True)
    below, above = (
        as_written(apply_policy(TWO, "per_token", flips[0].price + d, AMOUNTS)) for d in (-1e-4, 1e-4)
    )
    assert (int(choose(below)), int(choose(above))) == flips[0][1:] == (0, 1)
    assert flips[0].price == pytest.approx(1.35 / 0.9)


MATRIX = st.lists(st.integers(-50, 50), min_size=12, max_size=12).map(
    lambda row: np.array(row, np.float64).reshape(2, 3, 2) / 10
)


@settings(max_examples=60, deadline=None)
@given(
    matrix=MATRIX,
    policy=st.sampled_from(PRICED),
    written=st.booleans(),
    step=st.sampled_from(STEPS),
    data=st.data(),
)
def test_a_scan_of_prices_finds_the_same_regimes(matrix, policy, written, step, data):
    actions = data.draw(st.sampled_from([None, *itertools.combinations(range(3), 2)]))
    flips = break_even(matrix, priced(policy), actions, written, step)
    chosen = list(range(3)) if actions is None else list(actions)
    prices = np.linspace(0, 14, 701)
    edges = np.array([flip.price for flip in flips])
    seen = np.stack([priced(policy)(matrix, price)[:, chosen] for price in prices])
    found = np.array(chosen)[np.asarray(choose(as_written(seen, step) if written else seen))]
    regimes = [found[0], *(flip.after for flip in flips)]
    assert all(flip.before != flip.after for flip in flips)
    assert list(edges) == sorted(edges)
    welfare = np.sort(np.max(np.asarray(cell_welfare(seen)), axis=1))
    clear = written | (welfare[:, -1] - welfare[:, -2] > 1e-4)  # the choice takes closer ones for ties
    for price, action in itertools.compress(zip(prices, found, strict=True), clear):
        if not len(edges) or np.min(np.abs(edges - price)) > 1e-3:
            assert action == regimes[int(np.searchsorted(edges, price))], price


def test_the_published_bonus_flips_as_soon_as_there_is_a_price():
    flips = break_even(TWO, priced("published_llm"))
    assert all(flip.price > 0 for flip in flips)
    even = TWO.copy()
    even[1, 1] = (2.0, 2.8)  # half a point more for the user, and the question is the better one
    assert break_even(even, priced("published_llm"))[0] == (0.0, 0, 1)


def test_an_edit_without_lines_is_refused():
    with pytest.raises(UserError, match="not linear"):
        break_even(TWO, lambda payoff, price: payoff - price**2)


def test_an_edit_that_never_flips():
    assert break_even(TWO, priced("none")) == ()
