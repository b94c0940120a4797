"""Bootstrap means: exact where a closed form exists, calibrated, clustered, missing values left out."""

import numpy as np
import pytest

from gtalign_jax.evaluation.bootstrap import METRICS, bootstrap_means, format_table, summary_table


def bootstrap_mean(values, **options):
    return bootstrap_means(np.asarray(values, np.float64)[:, None], **options)[0]


def test_the_interval_of_two_clusters_is_the_exact_one():
    # Resamples of {0, 1}: means 0, 1/2, 1 with chances 1/4, 1/2, 1/4, so the 95 % interval is [0, 1].
    assert bootstrap_mean([0.0, 1.0]) == {"mean": 0.5, "lo": 0.0, "hi": 1.0, "n": 2, "clusters": 2}
    assert bootstrap_mean([3.0] * 5) == {"mean": 3.0, "lo": 3.0, "hi": 3.0, "n": 5, "clusters": 5}


def test_the_interval_matches_the_normal_one_on_many_values():
    values = np.random.default_rng(1).normal(2.0, 3.0, 4000)
    found = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found["mean"] == pytest.approx(values.mean())
    assert found["lo"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["hi"] == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_a_seed_decides_everything():
    values = np.random.default_rng(2).random(50)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_intervals_cover_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        found = bootstrap_mean(rng.normal(0.0, 1.0, 60), n_boot=400, seed=trial)
        covered += found["lo"] <= 0.0 <= found["hi"]
    assert 0.90 <= covered / 300 <= 0.98


def test_copies_of_a_prompt_add_no_certainty():
    values = np.random.default_rng(6).random(30)
    once = bootstrap_mean(values)
    copied = bootstrap_mean(np.repeat(values, 8), clusters=np.repeat(np.arange(30), 8))
    naive = bootstrap_mean(np.repeat(values, 8))
    assert (copied["lo"], copied["hi"]) == pytest.approx((once["lo"], once["hi"]))
    assert naive["hi"] - naive["lo"] < 0.5 * (copied["hi"] - copied["lo"])


def test_clusters_of_unequal_size_weigh_by_their_values():
    found = bootstrap_mean([1.0, 1.0, 1.0, 0.0], clusters=["a", "a", "a", "b"])
    assert found == {"mean": 0.75, "lo": 0.0, "hi": 1.0, "n": 4, "clusters": 2}


def test_missing_values_are_not_zeros():
    found = bootstrap_mean([1.0, np.nan, 1.0, np.nan])
    assert found == {"mean": 1.0, "lo": 1.0, "hi": 1.0, "n": 2, "clusters": 2}
    empty = bootstrap_mean([np.nan])
    assert empty["n"] == 0 and np.isnan(empty["mean"])
    assert bootstrap_mean([])["n"] == 0


def _rows(shift, tokens=100):
    rng = np.random.default_rng(7)
    rows = []
    for source in ("math-hard", "ambig_qa"):
        for prompt in range(20):
            row = dict.fromkeys(METRICS, 0.0)
            row |= {"source": source, "input": f"prompt {prompt}", "n_tokens": tokens + prompt}
            row |= {"utility": 0.3 + shift + 0.01 * rng.random(), "answer_reward": None if prompt else 1.0}
            rows.append(row)
    return rows


def test_the_summary_has_a_line_for_every_task_and_overall():
    summary = summary_table({"sft": _rows(0.0), "aligned": _rows(0.2)}, n_boot=200)
    assert list(summary) == ["sft", "aligned"]
    assert list(summary["sft"]) == ["math", "ambig_qa", "overall"]
    assert summary["sft"]["overall"]["utility"]["n"] == 40
    one = {"mean": 1.0, "lo": 1.0, "hi": 1.0, "n": 1, "clusters": 1}
    assert summary["sft"]["math"]["answer_reward"] == one
    by_hand = np.mean([row["utility"] for row in _rows(0.2)[:20]])
    assert summary["aligned"]["math"]["utility"]["mean"] == pytest.approx(by_hand)


def test_leaked_prompts_are_reported_apart():
    rows = _rows(0.0)
    for row in rows[:15]:
        row["seen"] = True
    summary = summary_table({"m": rows}, n_boot=50)["m"]
    assert list(summary) == ["math", "ambig_qa", "math (unseen)", "overall"]
    assert summary["math (unseen)"]["utility"]["n"] == 5 and summary["math"]["utility"]["n"] == 20


def test_the_terminal_table_marks_a_clear_change():
    summary = summary_table({"sft": _rows(0.0), "aligned": _rows(0.2)}, n_boot=200)
    text = format_table(summary, ("utility", "n_tokens"))
    lines = text.splitlines()
    assert lines[0] == "utility"
    assert lines[1].split() == ["task", "sft", "aligned", "change"]
    assert [line.split()[0] for line in lines[2:5]] == ["math", "ambig_qa", "overall"]
    assert lines[4].endswith("+0.200 *")
    assert len({line.index("]") for line in lines[2:5]}) == 1
    assert lines[-1].endswith("+0.0") and "109.5 [" in lines[-1]


def test_a_table_over_few_prompts_marks_nothing_and_warns():
    """Two prompts a task with eight completions each: narrow intervals that say nothing of other prompts."""
    few = {m: [row for row in _rows(s) if row["input"] in ("prompt 0", "prompt 1")] * 8 for m, s in SHIFTS}
    summary = summary_table(few, n_boot=200)
    assert summary["sft"]["math"]["utility"]["clusters"] == 2
    text = format_table(summary, ("utility",))
    assert "*" not in text
    assert "Fewer than 20 prompts: math (2), ambig_qa (2), overall (2)." in text.splitlines()[-1]
    many = summary_table({m: _rows(s) for m, s in SHIFTS}, n_boot=200)
    assert "*" in format_table(many) and "Fewer" not in format_table(many)


SHIFTS = (("sft", 0.0), ("aligned", 0.2))
