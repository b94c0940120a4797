"""Welfare functions: axioms as properties, CES limits against float64, derivatives finite and right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtalign_jax.game import welfare

rewards = st.floats(0.0, 2.0, width=32)
positive = st.floats(2.0**-13, 2.0, width=32)
weights = st.floats(0.125, 0.875, width=32)
rhos = st.sampled_from([-float("inf"), -1e30, -100.0, -1.0, -1e-3, -1e-9, 0.0, 1e-9, 1e-3, 0.5, 1.0])
RHOS = (-1e4, -100.0, -3.0, -1.0, -0.1, -1e-3, -1e-6, 1e-6, 1e-3, 0.1, 0.5, 1.0, 3.0)

CES = jax.jit(welfare.ces)
CES_GRADIENTS = jax.jit(jax.vmap(jax.grad(welfare.ces, argnums=(0, 1, 2))))


@pytest.fixture(scope="module")
def points() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return tuple(np.exp(rng.uniform(np.log(1e-4), np.log(2.0), (2, 400))).astype(np.float32))


def ces64(user, llm, rho, weight):
    """Float64, through logarithms so that large |rho| does not overflow."""
    user, llm = np.float64(user), np.float64(llm)
    terms = np.log(weight) + rho * np.log(user), np.log1p(-weight) + rho * np.log(llm)
    return np.exp(np.logaddexp(*terms) / rho)


@given(rewards, rewards, weights, rhos)
def test_nothing_for_one_side_is_no_welfare(user, llm, weight, rho):
    if rho <= 0:
        assert CES(0.0, llm, rho, weight) == 0.0
        assert CES(user, 0.0, rho, weight) == 0.0
    for function in (
        lambda u, v: welfare.cobb_douglas(u, v, weight),
        welfare.rawlsian,
        welfare.nash_bargaining,
    ):
        assert function(0.0, llm) == 0.0
        assert function(user, 0.0) == 0.0


@given(rewards, rewards, rhos)
def test_both_sides_count_alike_at_one_half(user, llm, rho):
    for function in (lambda u, v: CES(u, v, rho, 0.5), welfare.cobb_douglas):
        assert float(function(user, llm)) == pytest.approx(float(function(llm, user)), rel=2e-6)
    for function in (welfare.linear, welfare.rawlsian, welfare.nash_bargaining):
        assert function(user, llm) == function(llm, user)


@given(rewards, rewards, rewards, weights, rhos)
def test_more_for_one_side_is_never_less_welfare(user, more, llm, weight, rho):
    low, high = sorted((user, more))
    slack = 1 + 4e-6
    assert CES(low, llm, rho, weight) <= CES(high, llm, rho, weight) * slack
    assert CES(llm, low, rho, weight) <= CES(llm, high, rho, weight) * slack
    assert welfare.cobb_douglas(low, llm, weight) <= welfare.cobb_douglas(high, llm, weight) * slack
    assert welfare.nash_bargaining(low, llm, (0.5, 0.5)) <= welfare.nash_bargaining(high, llm, (0.5, 0.5))


@given(positive, positive, st.floats(0.125, 1.0, width=32), weights, st.sampled_from([-3.0, -1.0, 0.0, 0.5]))
def test_returns_diminish(user, llm, step, weight, rho):
    # The first of two equal steps gains more than the second: strict concavity below rho = 1.
    low, middle, high = CES(user + step * jnp.arange(3.0), llm, rho, weight)
    assert middle - low > high - middle - 2e-6 * high


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("rho", RHOS)
def test_ces_is_its_formula_in_float64(points, rho, weight):
    rho, weight = np.float32(rho), np.float32(weight)
    want = ces64(*points, np.float64(rho), np.float64(weight))
    np.testing.assert_allclose(CES(*points, rho, weight), want, rtol=5e-6)


def test_the_three_limits_are_exact(points):
    user, llm = points
    np.testing.assert_array_equal(CES(user, llm, -jnp.inf, 0.5), np.minimum(user, llm))
    np.testing.assert_array_equal(CES(user, llm, jnp.inf, 0.5), np.maximum(user, llm))
    np.testing.assert_allclose(CES(user, llm, 1.0, 0.3), welfare.linear(user, llm, 0.3), rtol=1.2e-7)
    np.testing.assert_allclose(CES(user, llm, 0.0, 0.3), welfare.cobb_douglas(user, llm, 0.3), rtol=2e-6)
    np.testing.assert_allclose(CES(user, llm, -1e7, 0.5), np.minimum(user, llm), rtol=2e-6)
    want = np.sqrt(np.float64(user) * np.float64(llm))
    np.testing.assert_allclose(welfare.cobb_douglas(user, llm), want, rtol=1e-6)


@pytest.mark.parametrize("rho", [-1.0, 0.0, 0.5, 1.0])
def test_ces_derivatives_match_their_closed_form(points, rho):
    user, llm = (np.float64(x) for x in points)
    w, logs = 0.25, (np.log(user), np.log(llm))
    value = user**w * llm ** (1 - w) if rho == 0 else ces64(user, llm, rho, w)
    rho_array, w_array = (np.full(len(user), x, np.float32) for x in (rho, w))
    by_user, by_llm, by_rho = CES_GRADIENTS(*points, rho_array, w_array)
    np.testing.assert_allclose(by_user, w * (value / user) ** (1 - rho), rtol=1e-5)
    np.testing.assert_allclose(by_llm, (1 - w) * (value / llm) ** (1 - rho), rtol=1e-5)
    if rho == 0:
        slope = value * w * (1 - w) * (logs[0] - logs[1]) ** 2 / 2
    else:
        powers = w * user**rho, (1 - w) * llm**rho
        mean_log = (powers[0] * logs[0] + powers[1] * logs[1]) / (powers[0] + powers[1])
        slope = value * (mean_log / rho - np.log(powers[0] + powers[1]) / rho**2)
    np.testing.assert_allclose(by_rho, slope, rtol=2e-4, atol=2e-6)


def test_derivatives_are_finite_wherever_rewards_are_not_negative():
    grid = np.float32([0.0, 1e-45, 1e-38, 1e-30, 1e-4, 0.5, 1.0, 3.0])
    user, llm = (x.ravel() for x in np.meshgrid(grid, grid))
    extremes = (-np.inf, -1e30, -1e3, -1.0, -1e-6, 0.0, 1e-6, 0.5, 1.0, 2.0, np.inf)
    for rho in extremes:
        for weight in (0.0, 0.3, 1.0):
            filled = (np.full(len(user), x, np.float32) for x in (rho, weight))
            assert all(np.isfinite(g).all() for g in CES_GRADIENTS(user, llm, *filled)), (rho, weight)
    others = {
        "cobb_douglas": lambda u, v: welfare.cobb_douglas(u, v, 0.3),
        "all_user": lambda u, v: welfare.cobb_douglas(u, v, 1.0),
        "linear": welfare.linear,
        "rawlsian": welfare.rawlsian,
        "nash_bargaining": lambda u, v: welfare.nash_bargaining(u, v, (0.2, 0.1)),
        "user_only": welfare.user_only,
        "llm_only": welfare.llm_only,
    }
    for name, function in others.items():
        found = jax.jit(jax.vmap(jax.grad(function, argnums=(0, 1))))(user, llm)
        assert all(np.isfinite(g).all() for g in found), name


def test_a_side_without_weight_does_not_count():
    user, llm = np.float32([0.0, 0.4, 2.0]), np.float32([0.7, 0.0, 0.1])
    np.testing.assert_array_equal(welfare.cobb_douglas(user, llm, 1.0) > 0, user > 0)
    for rho in (-1.0, 0.0, 1.0):
        np.testing.assert_allclose(CES(user, llm, rho, 1.0), user, rtol=1e-6)
        np.testing.assert_allclose(CES(user, llm, rho, 0.0), llm, rtol=1e-6)


def test_bargaining_measures_gains_over_disagreement():
    assert welfare.nash_bargaining(0.75, 0.5, (0.25, 0.25)) == 0.125
    assert welfare.nash_bargaining(0.125, 0.125, (0.25, 0.25)) == 0.0  # two losses are no gain
    user, llm = jnp.array([0.25, 0.5]), jnp.float32(1.0)
    np.testing.assert_array_equal(welfare.user_only(user, llm), [0.25, 0.5])
    np.testing.assert_array_equal(welfare.llm_only(user, llm), [1.0, 1.0])
