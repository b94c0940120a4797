"""Ratings beside welfare: the numbers against scipy, and what a file may hold."""

import numpy as np
import pytest
from scipy import stats

from gtalign_jax.errors import UserError
from gtalign_jax.evaluation.paper import tables
from gtalign_jax.evaluation.paper.entries import ENTRIES
from gtalign_jax.evaluation.paper.user_study import Rating, first_answers, read_ratings, study_table

ENTRY = ENTRIES["user_study"]


def runs(welfare):
    """{method: one run}, of welfare [methods, items]; each prompt is answered twice."""
    found = {}
    for method, row in zip(("sft", "cobb_douglas"), welfare, strict=True):
        lines = [{"input": f"q{i}", "output": "a", "utility": float(w)} for i, w in enumerate(row)]
        found[method] = [[*lines, *({**line, "utility": 9.0} for line in lines)]]
    return found


def test_correlations_are_those_of_the_mean_ratings_and_the_answers_that_were_rated():
    rng = np.random.default_rng(0)
    welfare = rng.random((2, 30))
    noisy = welfare + 0.2 * rng.normal(size=(2, 30))
    given = [
        Rating(str(i), method, noisy[m, i] + change)
        for m, method in enumerate(("sft", "cobb_douglas"))
        for i in range(30)
        for change in (-0.1, 0.1)  # two people
    ]
    table = study_table(ENTRY, runs(welfare), given)
    row = table.rows["all"]
    assert row["pearson"]["mean"] == pytest.approx(stats.pearsonr(noisy.ravel(), welfare.ravel())[0])
    assert row["spearman"]["mean"] == pytest.approx(stats.spearmanr(noisy.ravel(), welfare.ravel())[0])
    assert row["pearson"]["lo"] < row["pearson"]["mean"] < row["pearson"]["hi"]
    assert (row["pearson"]["n"], row["pearson"]["clusters"]) == (60, 30)
    assert table.rows["sft"]["rating"]["mean"] == pytest.approx(noisy[0].mean())
    assert table.verdict == tables.HELD
    opposite = [one._replace(rating=-one.rating) for one in given]
    assert study_table(ENTRY, runs(welfare), opposite).verdict == tables.NOT_HELD


def test_answers_to_one_item_are_drawn_together():
    """Both methods' answers to an item are alike, so the second tells nothing that the first did not."""
    rng = np.random.default_rng(1)
    welfare, noise = rng.random(40), rng.normal(size=40)
    both = [Rating(str(i), m, welfare[i] + noise[i]) for m in ("sft", "cobb_douglas") for i in range(40)]
    rows = study_table(ENTRY, runs(np.stack([welfare, welfare])), both).rows
    widths = [row["pearson"]["hi"] - row["pearson"]["lo"] for row in rows.values()]
    assert widths == pytest.approx([widths[0]] * 3, rel=0.1)


def test_ratings_that_are_all_one_correlate_with_nothing():
    given = [Rating(str(i), "sft", 3.0) for i in range(5)]
    table = study_table(ENTRY, runs(np.random.default_rng(0).random((2, 5))), given)
    assert np.isnan(table.rows["all"]["pearson"]["mean"])
    assert table.verdict == tables.UNDECIDED


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("item,rating\n0,1\n", "no column 'method'"),
        ("item,method,rating\n0,sft,\n", "no row has a rating"),
        ("item,method,rating\n" + "0,sft,nan\n" * 7, "line 6: rating 'nan' is no number and 2 more"),
        ("item,method,rating\n7,sft,3\n", "line 2: there is no answer of method 'sft' to item '7'"),
        ("item,method,rating\n7\n0,sft,4,5,6\n", ""),
    ],
)
def test_a_file_of_ratings_is_read_or_its_rows_are_named(text, words, tmp_path):
    path = tmp_path / "r.csv"
    path.write_text(text)
    known = first_answers(runs(np.zeros((2, 3))))
    if not words:
        assert read_ratings(path, known) == [Rating("0", "sft", 4.0)]
        return
    with pytest.raises(UserError, match=words):
        read_ratings(path, known)


def test_a_file_that_is_none_is_named(tmp_path):
    (tmp_path / "r.csv").write_bytes(b"item,method\xff")
    for name in ("r.csv", "nosuch.csv"):
        with pytest.raises(UserError, match=f"--ratings=.*{name}: cannot be read"):
            read_ratings(tmp_path / name, {})
