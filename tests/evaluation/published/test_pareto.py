"""The published comparison of two files on every recorded pair, and our exact area on the same points."""

import json

import pytest

from gtalign_jax.evaluation.published import pareto
from gtalign_jax.game import pareto as ours

FILES = {"pareto_golden.jsonl": 40, "pareto_edge_golden.jsonl": 30}


@pytest.fixture(scope="module", params=list(FILES))
def records(request, shared):
    lines = (shared / "golden" / request.param).read_text().splitlines()
    assert len(lines) == FILES[request.param]
    return [json.loads(line) for line in lines]


def leaves(tree, path=()):
    """(path, number) of every leaf, in any order."""
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in leaves(value, (*path, key))]
    return [(path, tree)]


def test_every_number_of_the_published_comparison(records):
    compared = 0
    for record in records:
        arguments = (record["a"], record["b"], record["eps"], record["alpha"])
        if "exception" in record["expected"]:
            error = {"ValueError": ValueError, "KeyError": KeyError}[record["expected"]["exception"]]
            with pytest.raises(error):
                pareto.compare(*arguments)
            continue
        expected, found = dict(leaves(record["expected"])), dict(leaves(pareto.compare(*arguments)))
        assert found.keys() == expected.keys()
        for path, value in expected.items():
            assert found[path] == pytest.approx(value, abs=1e-9, rel=0), (record["id"], path)
        compared += 1
    assert compared >= 24


def test_our_area_is_the_exact_one(records):
    for record in records:
        if record["exact_hypervolume"] is None:
            assert "exception" in record["expected"]
            continue
        sets, ranges = (pareto.load(record["a"]), pareto.load(record["b"])), record["expected"]["ranges"]
        common = [key for key in sets[0] if key in sets[1]]
        for name, points in zip(pareto.NAMES, sets, strict=True):
            area = ours.hypervolume([points[key] for key in common], (ranges["u_min"], ranges["l_min"]))
            assert area == pytest.approx(record["exact_hypervolume"][name], abs=1e-9, rel=0), record["id"]


def test_the_defects_that_set_our_numbers_apart():
    rows = [{"input": "q", "user_reward": 0.5, "llm_reward": 0.5}]
    published = pareto.compare(rows, rows, eps=0.05)["basic_compare"]
    assert published["incomparable"] == 1  # equal points dominate each other
    stairs = [{"input": str(i), "user_reward": i / 4, "llm_reward": 1 - i / 4} for i in range(5)]
    area = pareto.compare(stairs, stairs)["hypervolume_ref_(u_min,l_min)"]["file1"]
    assert area == 0.0  # the first box is empty
    assert ours.hypervolume(list(pareto.load(stairs).values()), (0.0, 0.0)) == 6 / 16
    twice = [*rows, {"input": " q ", "user_reward": 0.9, "llm_reward": 0.9}]
    assert pareto.load(twice) == {"q": (0.9, 0.9)}  # the last record wins
