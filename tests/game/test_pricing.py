"""Pricing policies: who pays for what, and the published edits beside the published numbers."""

import json

import jax
import numpy as np
import pytest

from gtalign_jax.errors import UserError
from gtalign_jax.game import pricing
from gtalign_jax.game.moves import GTALIGN, LLM, PLAYERS, USER
from gtalign_jax.game.pricing import Amounts

AMOUNTS = Amounts(tokens=(0.8, 0.1, 1.0), characters=(3.0, 0.5, 4.0), seconds=(12.0, 2.0, 16.0))
RANDOM = np.random.default_rng(0).uniform(-5, 5, (4, 2, 3, 2))


@pytest.mark.parametrize(
    ("policy", "payer", "amounts"),
    [
        ("per_token", USER, AMOUNTS.tokens),
        ("per_character", USER, AMOUNTS.characters),
        ("latency", USER, AMOUNTS.seconds),
        ("subscription", LLM, AMOUNTS.tokens),
    ],
)
def test_the_side_that_pays_loses_the_price_of_what_is_written(policy, payer, amounts):
    edited = pricing.apply_policy(RANDOM, policy, 0.5, AMOUNTS)
    taken = RANDOM - edited
    np.testing.assert_allclose(taken[..., payer], np.broadcast_to(0.5 * np.array(amounts), (4, 2, 3)))
    np.testing.assert_array_equal(taken[..., 1 - payer], 0)


def test_typical_amounts_are_in_units_of_a_direct_answer():
    edited = pricing.apply_policy(np.zeros((2, 3, 2)), "per_token", 2.0)
    np.testing.assert_allclose(edited[..., USER], np.tile([-2.0, -0.5, -2.5], (2, 1)))


def test_a_credit_has_the_user_pay_for_answers_alone():
    edited = pricing.user_credit(np.zeros((2, 3, 2)), 2.0, AMOUNTS)
    np.testing.assert_allclose(edited[0, :, USER], [-1.6, 0, 0])
    np.testing.assert_allclose(edited[0, :, LLM], [0, -0.2, -2.0])


def test_a_linear_map_mixes_the_players():
    felt = pricing.linear(RANDOM, np.array([[1.0, 0.0], [0.5, 1.0]]), np.array([0.0, -1.0]))
    np.testing.assert_allclose(felt[..., LLM], RANDOM[..., LLM] + 0.5 * RANDOM[..., USER])
    np.testing.assert_allclose(felt[..., USER], RANDOM[..., USER] - 1)


@pytest.mark.parametrize("policy", sorted(pricing.POLICIES))
def test_a_price_of_nothing_edits_nothing_and_every_policy_is_jitted(policy):
    np.testing.assert_array_equal(pricing.apply_policy(RANDOM, policy, 0.0, AMOUNTS), RANDOM)
    jitted = jax.jit(lambda payoff, price: pricing.apply_policy(payoff, policy, price, AMOUNTS))
    want = pricing.apply_policy(RANDOM, policy, 1.5, AMOUNTS)
    assert want.dtype == np.float64
    np.testing.assert_allclose(jitted(RANDOM, 1.5), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", ["payoff_golden.jsonl", "payoff_edge_golden.jsonl"])
def test_the_published_edits(shared, file):
    """Each recorded shift: the LLM's where there is one, else the user's; recorded with one decimal."""
    looked = 0
    for line in map(json.loads, (shared / "golden" / file).read_text().splitlines()):
        matrix, want = _array(line["payoff"]), _array(line["expected"]["transformed"])
        if matrix is None or not np.isfinite(matrix).all():
            continue
        shift = float(line["scale_llm"])
        policy = "published_llm" if shift else "published_user"
        edited = pricing.apply_policy(matrix, policy, shift or float(line["scale_user"]))
        np.testing.assert_allclose(edited, want, atol=0.05 + 1e-9)
        looked += bool(shift)
    assert looked >= 5


def _array(matrix):
    if set(matrix) != set(GTALIGN.keys):
        return None
    found = np.empty(GTALIGN.shape)
    for key, cell in matrix.items():
        found[GTALIGN.cell(key)] = [float(cell[player]) for player in PLAYERS]
    return found


def test_an_unknown_policy_names_the_known_ones():
    with pytest.raises(UserError, match="'free': use one of per_token, per_character, "):
        pricing.apply_policy(RANDOM, "free", 1.0)


def test_what_is_written_is_on_the_scale_with_one_decimal_and_no_minus_zero():
    written = pricing.as_written(np.array([-7.0, -0.04, 0.26, 5.2]))
    np.testing.assert_array_equal(written, [-5, 0, 0.3, 5])
    assert not np.signbit(written[1])
    np.testing.assert_array_equal(
        pricing.as_written(np.array([-7.0, -0.2, 0.3, 1.3, 4.8]), 0.5), [-5, 0, 0.5, 1.5, 5]
    )
    with pytest.raises(ValueError, match=r"^step=0.3: must be one of 0.1, 0.2, 0.5, 1.0"):
        pricing.check_step(0.3)


def test_a_provider_that_counts_too_many_tokens_earns_more_until_the_choice_flips():
    payoff = np.full((2, 3, 2), -5.0)
    payoff[1, 0], payoff[1, 1] = (2.0, 3.0), (2.0, 2.0)  # an answer, a short question
    honest = pricing.billed(payoff, 0.5)
    assert honest == pytest.approx(0.5)
    assert pricing.billed(payoff, 0.5, factor=2.0) == pytest.approx(1.0)
    assert pricing.billed(payoff, 0.5, factor=3.0) == pytest.approx(
        1.5 * 0.25
    )  # it asks instead, and earns less
