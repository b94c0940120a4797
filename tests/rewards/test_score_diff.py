"""The comparison with the published code on recorded completions, and its benchmark's peer."""

import json

import numpy as np
import pytest

from experiments import bench_reward, score_diff
from gtalign_jax.evaluation.published.score import score_lines


@pytest.mark.parametrize("reward", ["cobb_douglas", "cobb_douglas_frontier"])
def test_every_line_has_one_row_and_every_difference_a_name(shared, capsys, reward):
    path = shared / "golden" / "reward_golden.jsonl"
    score_diff.main([str(path), f"--reward={reward}"])
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    counts = {row[0].strip(): int(row[1]) for row in rows}
    assert counts.pop("all") == sum(counts.values()) == 600
    assert score_diff.ROWS["other"] not in counts
    assert counts[score_diff.ROWS["same"]] > 100
    records = [json.loads(line) for line in path.open()]
    published = [record["expected"].get(_recorded(reward), {}).get("score", 0.0) for record in records]
    finite = [x if isinstance(x, int | float) else 0.0 for x in published]
    assert float(rows[-1][2]) == pytest.approx(np.mean(finite), abs=6e-4)


def _recorded(reward: str) -> str:
    return {"cobb_douglas_frontier": "ablation"}.get(reward, reward)


@pytest.mark.parametrize("task", ["math", "medium"])
def test_the_benchmarks_peer_computes_the_published_fields(task):
    rows = bench_reward.make_rows(task, 16)
    rows = [*rows, *bench_reward.break_rows(rows)]
    extra = {"single_turn_prompt": "q", "chat_history": [{"role": "user", "content": "q"}]}
    lines = [
        {
            "task": row.task,
            "completion": row.completion,
            "ground_truth": row.ground_truth,
            "judge_text": row.judge_text,
            "extra_info": extra,
        }
        for row in rows
    ]
    for row, expected in zip(rows, score_lines(lines, "cobb_douglas"), strict=True):
        for name, value in bench_reward.peer_score(row).items():
            assert value == pytest.approx(expected[name], abs=1e-9), name


def test_the_benchmark_scores_what_it_makes():
    rows = bench_reward.make_rows("math", 16)
    assert (bench_reward.score_ours(rows) > 0.4).all()
    assert np.mean([len(row.completion.split()) for row in rows]) == pytest.approx(310, abs=20)
    broken = bench_reward.score_ours(bench_reward.break_rows(rows))
    np.testing.assert_array_equal(broken, 0.0)
