"""The page of a run: whole from its files alone, safe against what completions hold."""

import json
import pathlib
import re

import numpy as np
import pytest

from gtalign_jax import jsonl
from gtalign_jax.chain.prompt import format_chain
from gtalign_jax.errors import UserError
from gtalign_jax.evaluation.bootstrap import summary_table
from gtalign_jax.evaluation.report import curves, svg
from gtalign_jax.evaluation.report.samples import describe_matrices
from gtalign_jax.evaluation.report.write import embed_json, write_report
from gtalign_jax.rewards.judges.base import Verdict
from gtalign_jax.run.rollouts import RolloutLine, write_rollouts

HOSTILE = "</script><script>alert(1)</script> <img src=x onerror=alert(1)> \u2028 & done"


def line(source, i, shift=0.0, text=None):
    matrix = np.random.default_rng(i).uniform(-4, 4, (2, 3, 2)).round(1)
    user, llm = 0.4 + shift + 0.01 * i, 0.5 + shift
    return RolloutLine(
        input=f"prompt {i}",
        output=text or format_chain("Thought.", matrix, "choose CQ.", "Which one?"),
        gts="truth",
        source=source,
        step=3,
        score=float(np.sqrt(user * llm)),
        answer_reward=1.0,
        format_reward=1.0,
        payoff_reward=1.0,
        pareto_score=1.0,
        user_reward=user,
        llm_reward=llm,
        utility=float(np.sqrt(user * llm)),
        action="CQ",
        n_tokens=50 + i,
        verdict=Verdict(1.0, "rule"),
    ).fields()


@pytest.fixture
def workdir(tmp_path):
    rows = {
        model: [line(source, i, shift) for source in ("math-hard", "ambig_qa") for i in range(6)]
        for model, shift in (("sft", 0.0), ("aligned", 0.2))
    }
    rows["aligned"][0] = line("math-hard", 0, 0.2, HOSTILE)
    for model, lines in rows.items():
        write_rollouts(tmp_path, model, 3, lines)
    write_rollouts(tmp_path, "train", 0, rows["sft"])
    metrics = [
        {"phase": "align", "step": k, "time": 0.0, "reward/welfare": 0.3 + k / 50, "reward/user": 0.4}
        | {"reward/llm": 0.5, "kl/ref": 0.01 * k, "length/mean": 90.0, "entropy/mean": 1.0}
        for k in range(20)
    ]
    jsonl.write(tmp_path / "metrics.jsonl", metrics)
    (tmp_path / "config.json").write_text(json.dumps({"seed": 0, "align": {"steps": 20}}))
    (tmp_path / "summary.json").write_text(json.dumps(summary_table(rows, n_boot=50)))
    side = {"payoff": np.zeros((2, 3, 2)).tolist(), "action": "DA", "text": HOSTILE}
    steering = {"task": "math", "prompt": "p", "policy": "per_token", "price": 2.0}
    jsonl.write(tmp_path / "steering.jsonl", [{**steering, "before": side, "after": side}])
    return tmp_path


def data_of(page):
    block = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)
    return json.loads(block.group(1))


def test_the_page_holds_every_part_and_no_network(workdir):
    page = write_report(workdir).read_text()
    for part in ("Results", "Pareto", "Training", "Samples", "Steering", "Settings"):
        assert part in page
    assert "Fewer than 20 prompts: math (6), ambig_qa (6), overall (6)." in page
    assert 'class="num change clear"' not in page
    assert not re.search(r"(?:src|href)=[\"']?https?:", page)
    assert {path.name for path in (workdir / "figures").iterdir()} == {"curves.png", "pareto.png"}


def test_hostile_completions_stay_text(workdir):
    page = write_report(workdir).read_text()
    assert "alert(1)</script>" not in page and "<img src=x" not in page
    samples = data_of(page)["samples"]
    assert any(sample["raw"] and HOSTILE in sample["raw"] for sample in samples)


def test_samples_carry_blocks_matrix_frontier_and_choice(workdir):
    sample = next(s for s in data_of(write_report(workdir).read_text())["samples"] if s["matrix"])
    assert list(sample["blocks"]) == ["thinking", "payoff", "analyze", "response"]
    assert np.shape(sample["matrix"]["payoff"]) == (2, 3, 2)
    assert np.shape(sample["matrix"]["frontier"]) == (2, 3)
    assert sample["matrix"]["chosen"][1] == 1  # CQ


def test_a_run_that_just_began_has_a_page_too(tmp_path):
    assert "Nothing is recorded yet" in write_report(tmp_path).read_text()
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "gone")


def test_a_damaged_file_is_named(workdir):
    (workdir / "summary.json").write_text("{")
    with pytest.raises(UserError, match="summary.json: not JSON"):
        write_report(workdir)


def test_embedded_json_is_inert_and_exact():
    data = {"text": HOSTILE, "bad": float("nan")}
    text = embed_json(data)
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"text": HOSTILE, "bad": None}


def test_describe_matrices_marks_the_cell_the_choice_leads_to():
    payoff = np.zeros((1, 2, 3, 2))
    payoff[0, 1, 2] = (3.0, 3.0)
    found = describe_matrices(payoff, np.array([True]), ["AQ"])[0]
    assert found["chosen"] == [1, 2]
    assert np.argwhere(found["frontier"]).tolist() == [[1, 2]]
    assert describe_matrices(payoff, np.array([False]), ["AQ"]) == [None]


def test_no_line_leaves_its_axes_where_both_phases_record_the_same():
    """480 steps of cold start beside 50 of alignment, of other sizes too."""
    records = [
        {"phase": "sft", "step": k, "entropy/mean": 5.0 - k / 100, "loss/sft": 2.0} for k in range(480)
    ]
    records += [{"phase": "align", "step": k, "entropy/mean": 0.3, "reward/user": 0.1 * k} for k in range(50)]
    found = curves.panels(records)
    assert [panel.title for panel in found] == [
        "Rewards",
        "Entropy, align",
        "Entropy, sft",
        "Cold-start loss",
    ]
    assert [panel.series[0].x[-1] > 50 for panel in found] == [False, False, True, True]
    for panel in found:
        paths = re.findall(r' d="M([^"]+)"', svg.line_chart(panel))
        points = np.array([p.split(",") for path in paths for p in path.split("L")], np.float64)
        assert len(paths) == 2 * len(panel.series)
        assert (points >= (svg.LEFT - 0.1, svg.TOP - 0.1)).all()
        assert (points <= (svg.WIDTH, svg.HEIGHT - svg.BOTTOM + 0.1)).all()


def test_frontier_and_smoothing():
    points = [[0, 3], [1, 1], [2, 2], [3, 0], [2, 2], [1, 2.5]]
    rows = [{"user_reward": u, "llm_reward": v} for u, v in [*points, (9, None)]]
    cloud = curves.cloud("sft", rows)
    assert cloud.points.tolist() == points
    assert cloud.frontier.tolist() == [[3, 0], [2, 2], [1, 2.5], [0, 3]]
    assert curves.cloud("sft", rows[-1:]) is None
    flat = curves.smooth(np.full(40, 2.0))
    np.testing.assert_allclose(flat, 2.0)
    line = np.arange(40.0)
    np.testing.assert_allclose(curves.smooth(line)[5:-5], line[5:-5])


def test_ticks_are_round_and_inside():
    for lo, hi in ((0.0, 1.0), (-3.2, 17.0), (0.61, 0.64), (0, 12_345)):
        found = svg.ticks(lo, hi)
        assert 2 <= len(found) <= 9 and found.min() >= lo - 1e-9 and found.max() <= hi + 1e-9
        assert np.ptp(np.diff(found)) < 1e-9 * max(abs(hi), 1)


def test_the_template_folder_ships_with_the_package():
    page = pathlib.Path(svg.__file__).parent / "page"
    assert {p.name for p in page.iterdir()} == {"page.html", "page.js", "style.css"}


def test_credentials_that_a_run_recorded_are_not_on_the_page(tmp_path):
    recorded = {"judge": {"endpoints": ["http://user:hunter2@host/v1", "http://host/v1?api_key=hunter2"]}}
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    page = write_report(tmp_path).read_text()
    assert "***@host/v1" in page and "hunter2" not in page
