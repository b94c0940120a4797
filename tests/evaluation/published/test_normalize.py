"""Every recorded normalisation of the published code, and what must hold beyond the records."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtalign_jax.evaluation.published.normalize import METHODS, normalize

FILES = ("normalize_golden.jsonl", "normalize_edge_golden.jsonl")


@pytest.mark.parametrize("method", METHODS)
def test_every_recorded_value(shared, method):
    count = 0
    for name in FILES:
        for line in (shared / "golden" / name).open(encoding="utf-8"):
            record = json.loads(line)
            # zscore and minmax raise in the published code: their formulas' values stand beside it.
            raised = isinstance(record["expected"][method], dict)
            assert raised == (method in ("zscore", "minmax"))
            want = record["intended" if raised else "expected"][method]
            got = normalize([float(score) for score in record["scores"]], record["sources"], method)
            np.testing.assert_allclose(got, np.array(want, np.float64), atol=1e-5, err_msg=record["id"])
            count += 1
    assert count == 70


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 8).map(lambda k: k / 8)), min_size=1, max_size=20
    ),
    st.sampled_from(sorted(METHODS)),
)
def test_order_of_lines_does_not_matter(pairs, method):
    sources, scores = zip(*pairs, strict=True)
    forward, backward = normalize(scores, sources, method), normalize(scores[::-1], sources[::-1], method)
    np.testing.assert_allclose(forward, backward[::-1], atol=1e-4)
    assert np.isfinite(forward).all()


def test_bounded_methods_and_closed_forms():
    scores, sources = [0.0, 0.25, 0.5, 1.0, 0.75], ["a", "a", "a", "a", "b"]
    assert normalize(scores, sources, "minmax").tolist() == [0, 0.25, 0.5, 1, 0]
    assert normalize(scores, sources, "cdf").tolist() == [-0.75, -0.25, 0.25, 0.75, 0]
    assert normalize(scores, sources, "selfadapt")[0] == pytest.approx(math.tanh(-0.4375 / 2))
    assert normalize(scores, sources, "quantile").tolist() == [0, 0.25, 0.5, 0.75, 0.5]
    mean, std = 0.4375, math.sqrt(sum((x - 0.4375) ** 2 for x in scores[:4]) / 4)
    assert normalize(scores, sources, "zscore")[3] == pytest.approx((1 - mean) / std, abs=1e-5)
    assert normalize([], [], "james").tolist() == []
