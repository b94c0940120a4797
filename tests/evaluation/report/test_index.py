"""The page about several runs: what stands in it, from their files alone, and what is refused."""

import dataclasses
import json
import pathlib
import re
import shutil

import pytest

from experiments import report
from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.evaluation.report import curves, figures, settings
from gtalign_jax.evaluation.report.index import common_folder, load_runs
from gtalign_jax.evaluation.report.items import Contender, compare
from gtalign_jax.files import paths
from tests.evaluation.report.conftest import HOSTILE, line, record


def build(*flags):
    """What the command does."""
    report.main([str(flag) for flag in flags])


def rows_of(page, task):
    """The cells' text of each row of a task's table."""
    table = re.search(rf"<figcaption>{task}</figcaption>.*?</table>", page, re.S)[0]
    found = re.findall(r"<tr>.*?</tr>", table, re.S)[1:]
    return [[re.sub(r"<[^>]+>", "", c) for c in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in found]


def test_the_page_of_two_runs_stands_where_both_lie(runs, capsys):
    runs[0].joinpath("report.html").write_text("")
    build(*runs)
    place = runs[0].parent / "runs.html"
    assert capsys.readouterr().out == f"report  {place}\n"
    page = place.read_text()
    for part in ("Results", "Settings that differ", "Training", "Item by item", "Samples"):
        assert f"<h2>{part}</h2>" in page
    assert not re.search(r"(?:src|href)=[\"']?https?:", page)
    assert '<a href="first/report.html">first</a>' in page and "second/report.html" not in page
    rows = rows_of(page, "overall")
    assert [row[:2] + row[-1:] for row in rows] == [
        [run, model, "align 20"] for run in ("first", "second") for model in ("sft", "aligned")
    ]
    known = json.loads((runs[1] / "summary.json").read_text())["aligned"]["overall"]["utility"]
    assert rows[3][2] == f"{known['mean']:.3f} {known['lo']:.3f}–{known['hi']:.3f}"


def test_only_settings_that_differ_are_shown():
    first = {"seed": 0, "align": {"steps": 20, "lr": 0.1}}
    second = {"seed": 0, "align": {"steps": 30, "lr": 0.1}, "judge": {"path": "http://user:hunter2@host"}}
    assert settings.differences([first, second, first]) == [
        ("align.steps", ["20", "30", "20"]),
        ("judge.path", [None, '"http://***@host"', None]),
    ]


def test_models_are_compared_on_the_prompts_they_share():
    """Means over a prompt's completions; lines without a verdict count nowhere."""
    base = [line("math-hard", i) for i in range(6)]
    better = [line("math-hard", i, 0.2) for i in range(1, 7)]
    better += [line("math-hard", 1, 0.4), {**line("math-hard", 0), "utility": None}]
    found = compare([Contender("a", "sft", base), Contender("b", "aligned", better)], shown=3)
    assert found["contenders"][1] == {"run": "b", "model": "aligned"}
    (pair,) = found["pairs"]
    welfare = [row["utility"] for row in better[:5]]
    welfare[0] = (welfare[0] + better[6]["utility"]) / 2
    gains = [after - before["utility"] for after, before in zip(welfare, base[1:], strict=True)]
    assert pair["mean"] == pytest.approx(sum(gains) / 5) and pair["lo"] < pair["mean"] < pair["hi"]
    assert (pair["prompts"], pair["wins"], pair["losses"], found["total"]) == (5, 5, 0, 5)
    assert len(found["items"]) == 3  # those with the largest gains
    first = found["items"][0]
    assert (first["prompt"], first["truth"], first["task"]) == ("prompt 1", "truth", "math")
    assert [side["completions"] for side in first["sides"]] == [1, 2]
    assert first["sides"][1]["means"]["utility"] == pytest.approx(welfare[0])
    assert first["sides"][1]["means"]["user_reward"] == pytest.approx(0.71)
    assert first["sides"][1]["sample"]["blocks"]["response"] == "Which one? 0.2"


def test_models_that_share_no_prompt_are_no_pair():
    rows = [[line("math-hard", i)] for i in range(2)]
    found = compare([Contender("a", "sft", rows[0]), Contender("b", "sft", rows[1])])
    assert (found["pairs"], found["items"], found["total"]) == ([], [], 0)


def test_the_lines_of_runs_are_told_apart_by_colour_and_by_dashes(runs):
    records = {name: run.records for name, run in load_runs(map(str, runs)).items()}
    panels = curves.overlays(records, figures.RUN_ROLES[:2])
    assert [p.title for p in panels] == ["U", "L", "W", "KL to the reference", "Entropy", "Completion length"]
    assert [[s.name for s in p.series] for p in panels] == [["first", "second"]] * 6
    svg = figures.panel_svg(panels[0], named=False)
    assert "var(--run0)" in svg and re.search(r"stroke-dasharray: [^;]+;[^\"]* stroke: var\(--run1\)", svg)
    looks = {(figures.COLORS[role], figures.DASHES[role]) for role in figures.RUN_ROLES}
    assert len(looks) == len(figures.RUN_ROLES) == 28
    near = [figures.DASHES[role] for role in figures.RUN_ROLES[:4]]
    assert len(set(near)) == 4  # the first runs differ on grey paper too


def test_a_run_without_an_evaluation_stands_among_the_others(runs):
    for name in ("summary.json", "rollouts"):
        path = runs[1] / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    build(*runs, "--out", runs[0] / "deep" / "page")
    page = (runs[0] / "deep" / "page" / "runs.html").read_text()
    assert rows_of(page, "overall")[2] == ["second", "–", *"––––––", "align 20"]
    assert "2 runs, 1 of them evaluated" in page


def test_names_are_as_much_of_the_path_as_tells_runs_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        record(tmp_path / folder / "grpo")
    places = [str(tmp_path / folder / "grpo") for folder in ("a", "b")]
    runs = load_runs([*places, places[0] + "/"])
    assert list(runs) == ["a/grpo", "b/grpo"]
    assert common_folder(runs) == tmp_path


def test_one_run_has_its_own_report_again(workdir, capsys):
    build(workdir)
    assert capsys.readouterr().out == f"report  {workdir / 'report.html'}\n"
    assert "Steering" in (workdir / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (None, None, "no such folder; name the workdir of a run"),
        ("notes.txt", "", "has no metrics.jsonl or summary.json; name the workdir of a run or an evaluation"),
        ("metrics.jsonl", '{"loss": 1}\n', "lines without phase and step are no run's"),
        ("metrics.jsonl", '{"loss"\n{}\n', "metrics.jsonl:1"),
        ("summary.json", '{"best": {"loss": 1}}', "is not {model: {task: {metric: {mean, lo, hi, n}}}}"),
        ("summary.json", "[1]", "summary.json"),
    ],
)
def test_what_is_no_run_is_one_line_and_nothing_is_written(workdir, capsys, name, content, said):
    other = workdir / "other"
    if name:
        other.mkdir()
        (other / name).write_text(content)
    with pytest.raises(SystemExit, match="2"):
        build(workdir, other, "--out", workdir / "page")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(other) in error and said in error
    assert not (workdir / "page").exists()


def test_runs_without_a_common_folder_need_one_named(workdir):
    (here,) = load_runs([str(workdir)]).values()
    there = dataclasses.replace(here, workdir=pathlib.Path("/elsewhere"))
    with pytest.raises(UserError, match="--out=DIR"):
        common_folder({"here": here, "there": there})


def test_hostile_names_prompts_and_answers_stay_text(tmp_path):
    runs = [record(tmp_path / "<img src=x onerror=alert(1)>#"), record(tmp_path / "b", seed=1)]
    (runs[0] / "report.html").write_text("")
    summary = json.loads((runs[1] / "summary.json").read_text())
    summary["aligned"][HOSTILE] = summary["aligned"]["overall"]
    (runs[1] / "summary.json").write_text(json.dumps(summary))
    config = {"note": HOSTILE, "seed": 2}
    (runs[1] / "config.json").write_text(json.dumps(config))
    build(*runs)
    page = (tmp_path / "runs.html").read_text()
    assert "alert(1)</script>" not in page and "<img" not in page
    assert 'href="%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E%23/report.html"' in page
    data = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)[1])
    assert any(HOSTILE in item["prompt"] for item in data["compared"]["items"])
    assert any(sample["raw"] and HOSTILE in sample["raw"] for sample in data["samples"])


def test_a_run_that_goes_on_is_shown_as_far_as_it_has_come(runs):
    records = jsonl.read(runs[0] / "metrics.jsonl")
    jsonl.write(runs[0] / "metrics.jsonl", records[:7])
    build(*runs)
    page = (runs[0].parent / "runs.html").read_text()
    assert [row[-1] for row in rows_of(page, "math")] == ["align 7", "align 7", "align 20", "align 20"]


def test_runs_may_lie_on_a_store(gs, capsys):
    runs = [record(paths.path(f"{gs}/reports/{name}"), seed=seed) for seed, name in enumerate("ab")]
    build(*runs)
    page = paths.path(f"{gs}/reports/runs.html")
    assert capsys.readouterr().out == f"report  {page}\n"
    assert [row[0] for row in rows_of(page.read_text(), "overall")] == ["a", "a", "b", "b"]
