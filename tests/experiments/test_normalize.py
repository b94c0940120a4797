"""`experiments.normalize` on recorded files, in both definitions, and on input that is wrong."""

import json

import numpy as np
import pytest

from experiments import normalize
from gtalign_jax.evaluation.published.normalize import METHODS

BATCH = {"id": 3, "sources": ["a", "b", "a", "a", "b"], "scores": [0.5, 0.25, 1.0, 0.0, 0.75]}


@pytest.mark.parametrize("method", METHODS)
def test_reference_reproduces_the_recorded_files(shared, tmp_path, method):
    count = 0
    for golden in ("normalize_golden.jsonl", "normalize_edge_golden.jsonl"):
        out = tmp_path / "out.jsonl"
        normalize.main([str(shared / "golden" / golden), str(out), f"--method={method}", "--reference"])
        for row in map(json.loads, out.read_text().splitlines()):
            want = row["intended"].get(method, row["expected"][method])
            np.testing.assert_allclose(row["normalized"], want, atol=1e-5, err_msg=row["id"])
            count += 1
    assert count == 70


def test_default_zscore_by_hand_and_ids_are_kept(converted):
    rows = converted(normalize.main, [BATCH, {**BATCH, "sources": ["c"] * 5}], "--method=zscore")
    assert [row["id"] for row in rows] == [3, 3]
    assert rows[0]["scores"] == BATCH["scores"]
    std = np.std([0.5, 1, 0])
    np.testing.assert_allclose(rows[0]["normalized"], [0, -1, 0.5 / std, -0.5 / std, 1], atol=1e-4)
    assert abs(np.mean(rows[1]["normalized"])) < 1e-5


def test_a_score_that_is_missing_takes_no_part_and_stays_null(converted):
    (plain,) = converted(normalize.main, [BATCH], "--method=zscore")
    padded = {"sources": [*BATCH["sources"], "a", "b"], "scores": [*BATCH["scores"], None, "nan"]}
    (row,) = converted(normalize.main, [padded], "--method=zscore")
    assert row["normalized"][5:] == [None, None]
    np.testing.assert_allclose(row["normalized"][:5], plain["normalized"], atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_very_different_size_stay_apart(converted, method):
    """In float32 the squares of 1e30 are infinite, and every z-score was 0."""
    large = {"sources": ["a"] * 3, "scores": [1e30, 1, 0.5]}
    close = {"sources": ["a"] * 3, "scores": [1e9 + 1, 1e9 + 2, 1e9 + 3]}
    for row in converted(normalize.main, [large, close], f"--method={method}"):
        found = np.array(row["normalized"])
        assert np.isfinite(found).all() and found.std() > 0
    if method == "zscore":
        np.testing.assert_allclose(found, [-(1.5**0.5), 0, 1.5**0.5], atol=1e-5)


def test_reference_spells_what_json_cannot_hold(converted):
    (row,) = converted(
        normalize.main, [{"sources": ["a", "a"], "scores": [0.5, "nan"]}], "--method=zscore", "--reference"
    )
    assert row["normalized"] == ["nan", "nan"]


@pytest.mark.parametrize("mode", [[], ["--reference"]])
def test_an_empty_batch(converted, mode):
    assert converted(normalize.main, [{"sources": [], "scores": []}], *mode)[0]["normalized"] == []


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ({**BATCH, "scores": None}, "scores must be a list"),
        ({**BATCH, "sources": "a"}, "sources must be a list"),
        ({**BATCH, "sources": [1, 2, 3, 4, 5]}, "sources must be a list of strings"),
        ({**BATCH, "sources": ["a"]}, "sources holds 1 names for 5 scores"),
        ({**BATCH, "scores": [0.5, True, 1, 1, 1]}, "scores[1]='True'"),
        ({**BATCH, "scores": [0.5, "high", 1, 1, 1]}, "scores[1]='high'"),
        ({**BATCH, "scores": [10**400, 1, 1, 1, 1]}, "scores[0]: too large"),
    ],
)
@pytest.mark.parametrize("mode", [[], ["--reference"]])
def test_a_bad_line_is_named_and_the_output_is_left_alone(tmp_path, refused, write_lines, line, named, mode):
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    source = write_lines(tmp_path / "in.jsonl", [BATCH, line])
    error = refused(normalize.main, [source, out, *mode])
    assert f"{source}:2" in error and named in error
    assert out.read_text() == "old"


def test_wrong_flags_and_a_null_in_reference_mode(tmp_path, refused, write_lines):
    source = write_lines(tmp_path / "in.jsonl", [{"sources": ["a"], "scores": [None]}])
    assert "--method=rank: use one of" in refused(normalize.main, [source, tmp_path / "o", "--method=rank"])
    assert f"{source}:1: scores[0]" in refused(normalize.main, [source, tmp_path / "o", "--reference"])
    assert "cannot be read" in refused(normalize.main, [tmp_path / "absent", tmp_path / "o"])
