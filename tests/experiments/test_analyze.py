"""The command that compares two rollout files: numbers by hand, bad lines counted, recorded values."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments import analyze


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(input, user, llm, source="math-hard", **more) -> dict:
    return {"input": input, "source": source, "user_reward": user, "llm_reward": llm, **more}


@pytest.fixture
def files(tmp_path) -> tuple[str, str]:
    a = [row("q0", 0.25, 1.0), row("q1", 0.5, 0.5), row("p0", 0.5, 0.25, "medium"), row("only a", 1.0, 1.0)]
    b = [row("q0", 0.5, 1.0), row("q1", 0.25, 0.75), row("p0", 0.5, 0.25, "medium"), row("only b", 1.0, 1.0)]
    return write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b)


def run(capsys, *argv) -> dict:
    analyze.main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def means(part) -> dict:
    return {
        name: tuple(sides[s]["mean"] for s in ("a", "b", "change")) for name, sides in part["metrics"].items()
    }


def test_numbers_by_hand(capsys, files):
    found = run(capsys, *files, "--eps=0.25", "--alpha=1.0")
    assert list(found["sources"]) == ["math-hard", "medium", "overall"]
    part = found["sources"]["math-hard"]
    got = means(part)
    assert got["user_reward"] == (0.375, 0.375, 0.0)
    assert got["llm_reward"] == (0.75, 0.875, 0.125)
    assert got["cobb_douglas"] == got["user_reward"]  # alpha = 1 is the user alone
    nash_a, nash_b = (0.5 + 0.5) / 2, (np.sqrt(0.5) + np.sqrt(0.1875)) / 2
    assert got["nash"] == pytest.approx((nash_a, nash_b, nash_b - nash_a))
    # The joint frontier is (0.5, 1.0): regrets 0.25, 0.5 in A and 0, 0.25 in B.
    assert got["regret"] == (0.375, 0.125, -0.25)
    assert got["coverage"] == (0.5, 1.0, 0.5)
    # Boxes from (0, 0): A covers 0.25 x 1 and 0.25 x 0.5 more, B 0.5 x 1.
    assert got["hypervolume"] == (0.375, 0.5, 0.125)
    # Within 0.25 both pairs are equal; without tolerance B wins the first and the second is open.
    assert part["pairs"]["equal"]["mean"] == 1.0
    strict = run(capsys, *files, "--eps=0")["sources"]["math-hard"]["pairs"]
    assert [strict[k]["mean"] for k in ("a_dominates", "b_dominates", "equal", "incomparable")] == [
        0,
        0.5,
        0,
        0.5,
    ]
    assert found["sources"]["medium"]["n"] == 1 and found["sources"]["overall"]["n"] == 3
    assert found["counts"]["matched"] == 3 and found["counts"]["a"]["unmatched"] == 1


def test_the_area_starts_at_the_reference_point_alone(capsys, files):
    found = run(capsys, *files, "--reference_point", "0.25", "0.25")
    # Only (0.5, 0.5) of A is better than (0.25, 0.25) for both; what B holds does not matter.
    assert means(found["sources"]["math-hard"])["hypervolume"] == (0.0625, 0.1875, 0.125)


def test_bad_lines_are_left_out_and_counted_and_repeated_inputs_averaged(capsys, tmp_path):
    good = [row("q0", 0.2, 0.4), row(" q0\n", 0.6, 0.8)]
    bad = [row("q1", None, 0.5), row("q2", True, 0.5), row(7, 0.1, 0.1), row("q3", 0.5, float("nan"))]
    bad += [{"input": "q4", "user_reward": 0.5}, row("q5", "0.5", 0.5)]
    a, b = write(tmp_path / "a.jsonl", good + bad), write(tmp_path / "b.jsonl", [row("q0", 0.4, 0.6)])
    analyze.main([a, b, "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["counts"]["a"] == {"lines": 8, "invalid": 6, "inputs": 1, "repeated": 1, "unmatched": 0}
    assert means(found["sources"]["overall"])["user_reward"] == pytest.approx((0.4, 0.4, 0.0))
    nash = (np.sqrt(0.08) + np.sqrt(0.48)) / 2  # of each line, then averaged
    assert means(found["sources"]["overall"])["nash"][0] == pytest.approx(nash)


def test_a_broken_completion_is_a_zero_that_counts(capsys, tmp_path):
    a = write(tmp_path / "a.jsonl", [row("q0", 1.0, 1.0), row("q1", 0.0, 0.0), row("q2", 0.0, 0.0)])
    found = run(capsys, a, a)
    assert means(found["sources"]["overall"])["nash"] == pytest.approx((1 / 3, 1 / 3, 0.0))
    assert found["sources"]["overall"]["pairs"]["equal"]["mean"] == 1.0


def test_intervals_are_paired_and_repeatable(capsys, tmp_path):
    rng = np.random.default_rng(0)
    points = rng.uniform(0.2, 0.8, (200, 2))
    a = write(tmp_path / "a.jsonl", [row(str(i), *p) for i, p in enumerate(points.tolist())])
    b = write(tmp_path / "b.jsonl", [row(str(i), *p) for i, p in enumerate((points + 0.01).tolist())])
    found = run(capsys, a, b)
    for name in ("user_reward", "llm_reward"):
        sides = found["sources"]["overall"]["metrics"][name]
        # The sets overlap widely, yet every pair gains 0.01: pairing shows it.
        assert sides["a"]["hi"] > sides["b"]["lo"]
        assert sides["change"]["lo"] == pytest.approx(0.01) == sides["change"]["hi"]
    area = found["sources"]["overall"]["metrics"]["hypervolume"]
    assert area["a"]["lo"] < area["a"]["hi"] <= area["a"]["mean"]
    assert area["change"]["lo"] > 0
    assert run(capsys, a, b) == found
    assert run(capsys, a, b, "--seed=1") != found


def test_the_table_names_every_metric(capsys, files):
    analyze.main(list(files))
    out, err = capsys.readouterr()
    assert "3 matched inputs" in out
    for name in (*analyze.METRICS, "overall (3 inputs)", "b dominates 0.333", "+0.000"):
        assert name in out
    assert "fewer than 20 inputs" in out and "] *" not in out


def test_reference_prints_the_recorded_numbers(capsys, shared, tmp_path):
    lines = (shared / "golden" / "pareto_golden.jsonl").read_text().splitlines()
    for record in map(json.loads, lines[:3]):
        a, b = write(tmp_path / "a.jsonl", record["a"]), write(tmp_path / "b.jsonl", record["b"])
        flags = (f"--eps={record['eps']}", f"--alpha={record['alpha']}", "--reference")
        found = run(capsys, a, b, *flags)
        assert found.keys() == record["expected"].keys()
        for name in ("epsilon_coverage", "avg_regret_Linf", "hypervolume_ref_(u_min,l_min)", "NSW_avg"):
            assert found[name] == pytest.approx(record["expected"][name], abs=1e-9)
        assert found["basic_compare"] == record["expected"]["basic_compare"]
        analyze.main([a, b, *flags])
        table = capsys.readouterr().out
        common = str(record["expected"]["basic_compare"]["common_count"])
        assert ["basic_compare", "common_count", common] in [line.split() for line in table.splitlines()]


@pytest.mark.parametrize(
    ("rows_b", "flags", "message"),
    [
        ([row("other", 0.5, 0.5)], [], "share no input"),
        ([row("q0", None, 0.5)], [], "no line has an input"),
        ([row("q0", 0.5, 0.5)], ["--eps=-1"], "--eps=-1.0"),
        ([row("q0", 0.5, 0.5)], ["--eps=nan"], "--eps=nan"),
        ([row("q0", 0.5, 0.5)], ["--alpha=2"], "--alpha=2.0"),
        ([row("q0", 0.5, 0.5)], ["--reference_point", "inf", "0"], "--reference_point"),
        ([{"input": "q0", "user_reward": 0.5}], ["--reference"], "lacks 'llm_reward'"),
        ([row("other", 0.5, 0.5)], ["--reference"], "no common input"),
        ([row("q0", None, 0.5)], ["--reference"], "published analysis stops"),
        ([], [], "holds no lines"),
        (None, [], "no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, tmp_path, rows_b, flags, message):
    a, b = write(tmp_path / "a.jsonl", [row("q0", 0.5, 0.5)]), tmp_path / "b.jsonl"
    if rows_b is not None:
        write(b, rows_b)
    with pytest.raises(SystemExit) as stopped:
        analyze.main([a, str(b), *flags])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_logs_go_to_stderr_of_a_real_process(files):
    command = [sys.executable, "-m", "experiments.analyze", *files, "--json"]
    repo = pathlib.Path(analyze.__file__).parents[1]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["counts"]["matched"] == 3
    assert "1 inputs have no partner" in done.stderr
