"""Point-set metrics against brute force, exact areas in fractions, and properties of the definitions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtalign_jax.game import pareto

coordinate = st.integers(0, 8).map(lambda x: x / 8)  # eighths: ties, and floats that are exact
point_sets = st.lists(st.tuples(coordinate, coordinate), min_size=1, max_size=12)


def dominates(p, q) -> bool:
    return p[0] >= q[0] and p[1] >= q[1] and p != q


@given(point_sets)
def test_frontier_is_what_no_point_dominates(points):
    expected = [not any(dominates(q, p) for q in points) for p in points]
    assert pareto.frontier(points).tolist() == expected
    kept = {p for p, ok in zip(points, expected, strict=True) if ok}
    assert [tuple(p) for p in pareto.frontier_points(points)] == sorted(kept)


@given(point_sets, st.tuples(coordinate, coordinate))
def test_hypervolume_is_the_number_of_covered_cells(points, reference):
    cells = {
        (x, y)
        for user, llm in points
        for x in range(round(8 * reference[0]), round(8 * user))
        for y in range(round(8 * reference[1]), round(8 * llm))
    }
    assert Fraction(pareto.hypervolume(points, reference)) == Fraction(len(cells), 64)


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_is_the_chance_that_a_random_point_is_dominated(seed):
    rng, draws = np.random.default_rng(seed), 100_000
    points, reference = rng.uniform(-1, 1, (20, 2)), rng.uniform(-1, 0, 2)
    drawn = rng.uniform(reference, 1.0, (draws, 2))
    dominated = np.any(np.all(drawn[:, None] <= points, axis=2), axis=1)
    area = pareto.hypervolume(points, tuple(reference)) / np.prod(1.0 - reference)
    assert dominated.mean() == pytest.approx(area, abs=5 * np.sqrt(area * (1 - area) / draws))


@given(point_sets, st.integers(0, 2**32 - 1))
def test_areas_of_subsets_are_those_of_the_plain_function(points, seed):
    member = np.random.default_rng(seed).random((7, len(points))) < 0.5
    expected = [pareto.hypervolume(np.array(points)[row], (0.25, 0.125)) for row in member]
    np.testing.assert_allclose(pareto.hypervolumes(points, member, (0.25, 0.125)), expected, atol=1e-12)


@given(point_sets, point_sets)
def test_regret_is_the_least_shift_that_reaches_a_front_point(points, front):
    for point, value in zip(points, pareto.regret(points, front), strict=True):
        reaches = lambda t, p=point: any(p[0] + t >= f[0] and p[1] + t >= f[1] for f in front)
        assert reaches(value)
        assert value == 0 or not reaches(value - 1 / 16)


@given(point_sets, st.sampled_from([0.0, 0.125, 0.25]))
def test_coverage_is_the_share_within_eps_and_grows_with_it(points, eps):
    front = pareto.frontier_points(points)
    expected = np.mean(
        [
            any(all(f - p <= eps for f, p in zip(best, point, strict=True)) for best in front)
            for point in points
        ]
    )
    assert pareto.coverage(points, front, eps) == expected
    assert pareto.coverage(points, front, 0.0) == np.mean(pareto.frontier(points))
    assert pareto.coverage(points, front, 1.0) == 1.0


@given(st.lists(st.tuples(*[coordinate] * 4), min_size=1, max_size=12), st.sampled_from([0.0, 0.125, 0.5]))
def test_pairs_fall_into_exactly_one_class_that_swaps_with_the_sides(pairs, eps):
    a, b = np.array(pairs)[:, :2], np.array(pairs)[:, 2:]
    counts, swapped = pareto.dominance_counts(a, b, eps), pareto.dominance_counts(b, a, eps)
    assert sum(counts.values()) == len(pairs)
    assert counts["a_dominates"] == swapped["b_dominates"]
    assert counts["equal"] == swapped["equal"] and counts["incomparable"] == swapped["incomparable"]
    if eps == 0:
        assert counts["a_dominates"] == sum(dominates(tuple(p), tuple(q)) for p, q in zip(a, b, strict=True))
        assert counts["equal"] == sum(tuple(p) == tuple(q) for p, q in zip(a, b, strict=True))


def test_equal_points_never_dominate_each_other_whatever_eps():
    points = [[0.3, 0.7], [0.1, 0.2]]
    for eps in (0.0, 0.05, 1.0):
        assert pareto.dominance_counts(points, points, eps)["equal"] == 2


def test_decimals_exactly_eps_apart_count_as_within_eps():
    assert pareto.dominance_counts([[0.15, 0.5]], [[0.1, 0.5]], 0.05)["equal"] == 1
    assert pareto.coverage([[0.1, 0.5]], [[0.15, 0.5]], 0.05) == 1.0


def test_averages():
    points = [[0.25, 1.0], [0.0, 0.7], [-0.2, -0.3]]  # two losses are no gain
    assert pareto.nash_average(points) == pytest.approx(0.5 / 3)
    assert pareto.cobb_douglas_average(points, 0.25) == pytest.approx(0.25**0.25 / 3)
    assert np.isnan(pareto.nash_average([])) and np.isnan(pareto.coverage([], points, 0.1))
    assert pareto.hypervolume([], (0, 0)) == 0.0


def test_bad_points_are_refused():
    with pytest.raises(ValueError, match="finite"):
        pareto.frontier([[0.1, np.nan]])
    with pytest.raises(ValueError, match=r"shape \[n, 2\]"):
        pareto.hypervolume([0.1, 0.2, 0.3], (0, 0))
    with pytest.raises(ValueError, match="as many points"):
        pareto.compare([[0, 0]], [[0, 0], [1, 1]])
    with pytest.raises(ValueError, match="no point"):
        pareto.regret([[0, 0]], [])
