"""The published edits and choices on a matrix, on every recorded matrix."""

import json
import math

import pytest

from gtalign_jax.evaluation.published import payoff

FILES = {"payoff_golden.jsonl": 60, "payoff_edge_golden.jsonl": 30}


def number(value) -> float:
    """A recorded number; those not finite are written as text."""
    return float(value)


@pytest.fixture(scope="module", params=list(FILES))
def records(request, shared):
    lines = (shared / "golden" / request.param).read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == FILES[request.param]
    for record in found:
        cells = record["payoff"].items()
        record["payoff"] = {key: {p: number(x) for p, x in cell.items()} for key, cell in cells}
    return found


def test_frontier_and_choices(records):
    for record in records:
        expected, matrix = record["expected"], record["payoff"]
        assert payoff.frontier(matrix) == expected["frontier"], record["id"]
        assert payoff.product_optimal_keys(matrix) == expected["product_optimal_keys"], record["id"]
        assert payoff.product_optimal_actions(matrix) == expected["product_optimal_actions"], record["id"]


def test_edited_matrices(records):
    for record in records:
        found = payoff.transform(record["payoff"], record["scale_llm"], record["scale_user"])
        expected = record["expected"]["transformed"]
        assert list(found) == list(expected)
        for key, cell in expected.items():
            for player, value in cell.items():
                want, got = number(value), found[key][player]
                assert got == want or (math.isnan(want) and math.isnan(got)), (record["id"], key, player)


def test_the_defect_that_two_losses_win():
    matrix = {"VQ_DA": {"LLM": -3.0, "user": -3.0}, "DQ_AQ": {"LLM": 2.0, "user": 2.0}}
    assert payoff.product_optimal_actions(matrix) == ["DA"]
    assert payoff.frontier(matrix) == ["DQ_AQ"]
