"""Paired differences: exact where prompts agree, calibrated by simulation, adjusted as published examples."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtalign_jax.evaluation.paired import by_prompt, cohens_kappa, holm, paired_difference


def runs(values):
    """Lines of values [seeds, prompts]."""
    return [[{"input": str(i), "m": v} for i, v in enumerate(row)] for row in values]


def test_what_is_the_same_on_every_prompt_is_certain():
    noise = np.random.default_rng(0).normal(size=(1, 30)) * 10
    found = paired_difference(runs(noise + 0.25), runs(noise), "m", n_boot=200)
    assert (found.mean, found.lo, found.hi) == pytest.approx((0.25, 0.25, 0.25))
    assert found.p < 0.02
    assert (found.seeds, found.prompts) == (1, 30)


def test_completions_of_a_prompt_are_one_value_and_missing_ones_count_nowhere():
    lines = [{"input": "a", "m": 1.0}, {"input": "a", "m": 3.0}, {"input": "b", "m": None}, {"input": "c"}]
    assert by_prompt([lines], "m") == [{"a": 2.0}]


def test_without_a_shared_prompt_nothing_is_said():
    found = paired_difference([[{"input": "a", "m": 1.0}]], [[{"input": "b", "m": 1.0}]], "m")
    assert math.isnan(found.mean)
    assert found.prompts == 0


def test_a_difference_between_seeds_alone_is_no_difference_of_methods():
    """Three seeds that differ more than the methods do: prompts by the hundred do not make it certain."""
    rng = np.random.default_rng(1)
    luck = np.array([0.4, -0.3, 0.1])[:, None]
    first = luck + rng.normal(size=(3, 400)) * 0.1
    found = paired_difference(runs(first), runs(rng.normal(size=(3, 400)) * 0.1), "m", n_boot=500)
    assert found.lo < 0 < found.hi


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(2), 0
    for i in range(100):
        effect, prompts = rng.normal(size=(8, 1)) * 0.2, rng.normal(size=40) * 0.5
        first = 0.3 + effect + prompts + rng.normal(size=(8, 40)) * 0.3
        found = paired_difference(runs(first), runs(np.zeros((8, 40))), "m", n_boot=200, seed=i)
        covered += found.lo <= 0.3 <= found.hi
    assert covered >= 85  # small samples of seeds make a bootstrap a little short


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_and_keeps_the_order(p):
    adjusted = holm(p)
    assert all(a >= b for a, b in zip(adjusted, p, strict=True))
    order = np.argsort(p, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)
    assert max(adjusted) <= 1


def test_kappa_of_the_textbook():
    """Cohen (1960): 20 + 15 agreements of 50, 5 and 10 otherwise: p_o 0.7, p_e 0.5, kappa 0.4."""
    pairs = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15
    assert cohens_kappa(*zip(*pairs, strict=True)) == pytest.approx(0.4)
    assert math.isnan(cohens_kappa([1, 1], [1, 1]))
    with pytest.raises(ValueError, match="2 verdicts against 1"):
        cohens_kappa([1, 1], [1])
