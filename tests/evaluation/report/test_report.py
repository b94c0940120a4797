"""The page of a run: whole from its files alone, safe against what completions hold."""

import html
import json
import re

import numpy as np
import pytest

from gtalign_jax.errors import UserError
from gtalign_jax.evaluation.report import curves, figures
from gtalign_jax.evaluation.report.render import PAGE, embed_json
from gtalign_jax.evaluation.report.samples import describe_matrices
from gtalign_jax.evaluation.report.write import write_report
from tests.evaluation.report.conftest import HOSTILE


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
    assert [(panel.title, panel.phase) for panel in found] == [
        ("Rewards", "align"),
        ("Entropy", "align"),
        ("Entropy", "sft"),
        ("Cold-start loss", "sft"),
    ]
    assert [panel.series[0].x[-1] > 50 for panel in found] == [False, False, True, True]
    for panel in found:
        svg = figures.panel_svg(panel)
        left, top, width, height = (float(v) for v in re.findall(r'"([-\d.]+)"', AXES.search(svg)[1]))
        lines = [points(path) for path in re.findall(r'd="([^"]+)" clip-path', svg)]
        assert len(lines) >= 2 * len(panel.series)
        assert all((line >= (left, top)).all() for line in lines)
        assert all((line <= (left + width, top + height)).all() for line in lines)
        (shown,) = json.loads(html.unescape(re.search(r'data-chart="([^"]+)"', svg)[1]))
        np.testing.assert_allclose(
            np.stack([shown["x"], shown["y"]], axis=1)[[0, -1]], lines[-1][[0, -1]], atol=0.1
        )


AXES = re.compile(r"<clipPath[^>]*>\s*<rect ([^/]+)/>")


def points(path):
    """The points [n, 2] of an SVG path."""
    return np.array(re.findall(r"[-\d.]+", path), np.float64).reshape(-1, 2)


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


def test_the_template_folder_ships_with_the_package():
    names = "base.html browser.html charts.html index.html index.js page.html page.js parts.js style.css"
    assert {path.name for path in PAGE.iterdir()} == set(names.split())


def test_credentials_that_a_run_recorded_are_not_on_the_page(tmp_path):
    recorded = {"judge": {"endpoints": ["http://user:hunter2@host/v1", "http://host/v1?api_key=hunter2"]}}
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    page = write_report(tmp_path).read_text()
    assert "***@host/v1" in page and "hunter2" not in page
