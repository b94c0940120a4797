"""`experiments.score` on recorded files, in both definitions, and on input that is wrong."""

import json
import math
import sys
import tracemalloc

import numpy as np
import pytest

from experiments import score
from gtalign_jax.evaluation.published.reward import FRONTIER
from gtalign_jax.rewards.mutual_welfare import mutual_welfare

CELLS = {
    f"{m}_{a}": {"LLM": 1.0 + i, "user": 2.5 * i}
    for i, m in enumerate(("VQ", "DQ"))
    for a in ("DA", "CQ", "AQ")
}


def _chain(response: str = "The answer is 4.", analyze: str = "So DQ_AQ.") -> str:
    return (
        f"<thinking>t</thinking>\n<payoff>{json.dumps(CELLS)}</payoff>\n"
        f"<analyze>{analyze}</analyze>\n<response>{response}</response>"
    )


def _line(**fields) -> dict:
    return {
        "id": 7,
        "task": "math",
        "completion": _chain(),
        "ground_truth": "4",
        "judge_text": r"\boxed{1}",
    } | fields


def test_reference_reproduces_the_recorded_files(shared, tmp_path):
    """Every variant is checked record by record in tests/evaluation/published; here the command."""
    for golden, recorded, name in (
        ("reward_golden.jsonl", "cobb_douglas", "cobb_douglas"),
        ("reward_edge_golden.jsonl", "ablation", FRONTIER),
    ):
        out = tmp_path / "out.jsonl"
        score.main(
            [str(shared / "golden" / golden), str(out), f"--reward={name}", "--reference", "--batch_size=97"]
        )
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]
        assert len(rows) in (600, 350)
        for row in rows:
            want = row["expected"].get(recorded, {"exception": "NotImplementedError"})
            if "exception" in want:
                assert row["score"] == row["utility"] == 0
                assert want["exception"] in row["errors"][0]
                continue
            for key, value in want.items():
                np.testing.assert_allclose(
                    float(row[key]), float(value), rtol=0, atol=1e-9, err_msg=row["id"]
                )


def test_output_is_the_input_with_the_fields_of_a_rollout_line(converted):
    (row,) = converted(score.main, [_line(extra_info={"a": "\ud800"})])
    assert {key: row[key] for key in ("id", "task", "ground_truth")} == {
        "id": 7,
        "task": "math",
        "ground_truth": "4",
    }
    assert row["extra_info"] == {"a": "\ud800"}
    assert row["judge"]["verdict"] == 1 and row["errors"] == []
    assert row["format_reward"] == 1 and row["action"] == "AQ" and row["pareto_score"] == 1
    # Every cell's payoffs differ by more than a tenth: M = 1; the rest from the formulas by hand.
    band = lambda n, low, high: 1 / ((1 + math.exp(-0.005 * (n - low))) * (1 + math.exp(-0.005 * (high - n))))
    text = _chain()
    user = 1e-4 + 0.5 + 0.2 * band(4, 20, 500) + 0.3 * math.exp(-text.index("<response>") / 500)
    llm = 1e-4 + 0.2 + 0.2 + 0.4 + 0.2 * band(len(text.split()), 500, 1000)
    assert row["payoff_reward"] == pytest.approx(1)
    assert row["user_reward"] == pytest.approx(user, abs=1e-6)
    assert row["llm_reward"] == pytest.approx(llm, abs=1e-6)
    assert [row["score"], row["utility"]] == pytest.approx([math.sqrt(user * llm)] * 2, abs=1e-6)
    assert row["reward_gap"] == pytest.approx(abs(user - llm), abs=1e-6)


def test_rewards_differ_in_score_only(converted):
    by_name = {
        name: converted(score.main, [_line()], f"--reward={name}")[0]
        for name in ("linear", "user", "rawlsian")
    }
    user, llm = by_name["user"]["user_reward"], by_name["user"]["llm_reward"]
    assert by_name["linear"]["score"] == pytest.approx((user + llm) / 2, abs=1e-6)
    assert by_name["user"]["score"] == user
    assert by_name["rawlsian"]["score"] == min(user, llm)
    assert (
        len({row["utility"] for row in by_name.values()})
        == 1
        < len({row["score"] for row in by_name.values()})
    )


def test_a_missing_verdict_is_null_with_its_reason_and_never_zero(converted):
    rows = converted(score.main, [_line(judge_text="I cannot say"), _line(completion="no chain at all")])
    for key in ("score", "answer_reward", "user_reward", "llm_reward", "utility", "reward_gap"):
        assert rows[0][key] is None
        assert rows[1][key] == 0
    assert rows[0]["judge"]["verdict"] is None and "no verdict" in rows[0]["judge"]["reason"]
    assert rows[0]["format_reward"] == 1
    assert any("response" in reason for reason in rows[1]["errors"])


def test_the_last_verdict_counts_and_the_published_code_takes_the_first(converted):
    line = _line(judge_text=r"<think>\boxed{0}</think> \boxed{1}", extra_info={"single_turn_prompt": "q"})
    assert converted(score.main, [line])[0]["answer_reward"] == 1
    assert converted(score.main, [line], "--reference")[0]["answer_reward"] == 0


def test_verdicts_stay_with_their_lines(converted):
    """Equal completions with other verdicts, lines that are not judged in between, several batches."""
    texts = [rf"\boxed{{{i % 2}}}" for i in range(10)]
    rows = [
        _line(judge_text=text) if i % 3 else _line(judge_text=text, completion="x")
        for i, text in enumerate(texts)
    ]
    scored = converted(score.main, rows, "--batch_size=4")
    assert [row["answer_reward"] for row in scored] == [float(i % 2 and i % 3 > 0) for i in range(10)]


def test_without_a_judge_text_rules_judge_and_stderr_says_so(converted, capsys):
    line = _line(completion=_chain(r"\boxed{5}"))
    del line["judge_text"]
    rows = converted(score.main, [line, {**line, "completion": _chain(r"\boxed{4}")}, _line()])
    assert [row["judge"]["verdict"] for row in rows] == [0, 1, 1]
    assert "2 lines have no judge_text and were judged by rules" in capsys.readouterr().err


def half_welfare(features, config):
    reward = mutual_welfare(features, config)
    return reward.replace(welfare=reward.welfare / 2, parts={})


def not_a_reward(features, config):
    return features.answer_user


def test_a_reward_of_the_users_own(tmp_path, converted, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_rewards", sys.modules[__name__])
    row = converted(score.main, [_line()], "--reward=my_rewards:half_welfare")[0]
    assert row["score"] == pytest.approx(row["utility"] / 2, rel=1e-6)
    assert row["payoff_reward"] is None
    paths = (tmp_path / "in.jsonl", tmp_path / "new.jsonl")
    assert "must return a Reward" in refused(score.main, [*paths, "--reward=my_rewards:not_a_reward"])
    assert "--reward='nope'" in refused(score.main, [*paths, "--reward=nope"])
    assert "--reward=rawlsian" in refused(score.main, [*paths, "--reward=rawlsian", "--reference"])
    assert "--batch_size=0" in refused(score.main, [*paths, "--batch_size=0"])


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"task": "\xff"}', "not UTF-8"),
        (json.dumps(_line(task="chess")).encode(), "task='chess'"),
        (json.dumps(_line(task=["math"])).encode(), "task="),
        (json.dumps(_line(completion=None)).encode(), "completion must be a string"),
        (json.dumps(_line(ground_truth=4)).encode(), "ground_truth must be a string"),
        (json.dumps(_line(judge_text=1)).encode(), "judge_text must be"),
        (json.dumps(_line(extra_info=[])).encode(), "extra_info must be an object"),
    ],
)
@pytest.mark.parametrize("mode", [[], ["--reference"]])
def test_a_bad_line_is_named_and_the_output_is_left_alone(tmp_path, refused, line, named, mode):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(json.dumps(_line()).encode() + b"\n\n" + line + b"\n")
    out.write_text("old")
    error = refused(score.main, [source, out, "--batch_size=1", *mode])
    assert f"{source}:3" in error and named in error
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_reference_needs_the_judges_text(tmp_path, refused, write_lines):
    source = write_lines(tmp_path / "in.jsonl", [_line(judge_text=None)])
    assert f"{source}:1: judge_text is missing" in refused(
        score.main, [source, tmp_path / "o", "--reference"]
    )


def test_files_that_cannot_be_read_or_written(tmp_path, refused, write_lines):
    source, empty = write_lines(tmp_path / "in.jsonl", [_line()]), write_lines(tmp_path / "empty.jsonl", [])
    assert "cannot be read" in refused(score.main, [tmp_path / "absent", tmp_path / "o"])
    assert "holds no lines" in refused(score.main, [empty, tmp_path / "o"])
    assert "is a folder" in refused(score.main, [source, tmp_path])
    assert "cannot write there" in refused(score.main, [source, source + "/o"])


def test_memory_does_not_grow_with_the_file(tmp_path, write_lines):
    def peak(lines: int) -> int:
        source = write_lines(tmp_path / "in.jsonl", [_line(extra_info={"pad": "x" * 2000})] * lines)
        tracemalloc.start()
        score.main([source, str(tmp_path / "out.jsonl"), "--reference", "--batch_size=20"])
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    small, large = peak(40), peak(400)
    assert large < 1.5 * small
