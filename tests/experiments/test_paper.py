"""`experiments.paper` as a researcher calls it: a table from nothing, the same again, and bad input."""

import csv
import json
from collections import Counter

import pytest

from experiments import paper, paper_models
from experiments.paper_models import SCALES, Countdown, answers, missing, open_lab
from gtalign_jax import jsonl
from gtalign_jax.data import sources
from gtalign_jax.evaluation.paper.entries import ALIGNED, BASE, ENTRIES, SFT, Method
from gtalign_jax.run.auto import with_values
from gtalign_jax.run.settings import make_settings, run_tasks


def test_a_table_from_nothing_and_the_same_again(tmp_path, capsys, monkeypatch):
    flags = ["--scale=smoke", "--table=efficiency", "--seeds=0", f"--workdir={tmp_path}"]
    paper.main(flags)
    printed, said = capsys.readouterr()
    assert "to train: cold starts 1, alignments 1" in said
    assert "model 2 of 2: cobb_douglas, seed 0" in said
    assert "Seeds of the alignments: 0." in printed
    assert printed.startswith("## efficiency")
    found = json.loads((tmp_path / "tables" / "efficiency.json").read_text())
    assert set(found["rows"]) == {"sft", "cobb_douglas"}
    assert found["differences"]["sft"]["prompts"] == 8
    assert found["verdict"] in ("held", "did not hold", "undecided")
    assert "| efficiency | more answer quality" in (tmp_path / "claims.md").read_text()
    assert "<svg" in (tmp_path / "tables" / "efficiency.svg").read_text()
    page = (tmp_path / "tables" / "index.md").read_text()
    assert "## efficiency\n\n| |" in page and "![efficiency](efficiency.svg)" in page
    monkeypatch.setattr(paper_models, "train_start", None)  # nothing is trained again
    paper.main(flags)
    assert capsys.readouterr().out == printed
    # Another table takes the models that are there; these write no matrix.
    paper.main([flags[0], "--table=choice_rule", *flags[2:]])
    assert "No answer holds what this table is made of." in capsys.readouterr().out
    paper.main([flags[0], "--table=steering", *flags[2:]])
    assert "price 8" in capsys.readouterr().out
    lines = jsonl.read(tmp_path / "steering" / "aligned_seed=0" / "sweep.jsonl")
    assert len(lines) == 8 * 5
    assert "<svg" in (tmp_path / "tables" / "steering.svg").read_text()
    paper.main([flags[0], "--table=out_of_domain", *flags[2:]])
    assert "these have: smollm2, 0.5b" in capsys.readouterr().out
    # The base model is what the cold start began with, and reads with its tokenizer.
    lab = open_lab(SCALES["smoke"], SCALES["smoke"].config(), tmp_path, [], [0])
    (lines,) = answers(lab, ENTRIES["baselines"], Method("base", stage=BASE), [0])
    assert len({line["input"] for line in lines}) == 8 and (tmp_path / "evaluations" / "base").is_dir()


def test_games_need_no_model(tmp_path, capsys):
    paper.main(["--scale=smoke", "--table=games", f"--workdir={tmp_path}"])
    assert "bargaining: first keeps" in capsys.readouterr().out
    assert jsonl.read_object(tmp_path / "tables" / "games.json")["verdict"] == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--table=nosuch"], "--table=nosuch: no such table; use baselines"),
        (["--table=games", "--seeds=0,0"], "--seeds: 0 stands there twice"),
        (["--table=games", "--ratings=r.csv"], "--ratings: is of the table user_study"),
        (["--table=games", "--tables=x"], "tables"),
        (["--table=games", "--config.algin.steps=3"], "algin"),
    ],
)
def test_what_is_not_there_is_one_line(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        paper.main(["--scale=smoke", f"--workdir={tmp_path}", *flags])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_folder_holds_one_scale(tmp_path, capsys):
    flags = ["--table=games", f"--workdir={tmp_path}"]
    paper.main(["--scale=smoke", *flags])
    with pytest.raises(SystemExit):
        paper.main(["--scale=tiny", *flags])
    assert "scale.json: holds the models of another scale" in capsys.readouterr().err


def test_models_that_change_the_same_are_counted_and_trained_once(tmp_path):
    all_of = [ENTRIES[name] for name in ("efficiency", "data_size", "sizes")]
    ours = Method("cobb_douglas")
    assert ours.folder(0) == Method("all").folder(0) == "aligned_seed=0"
    assert missing(all_of, [0, 1], tmp_path) == {SFT: 5, ALIGNED: 10}
    assert missing([ENTRIES["weights"]], [0, 1, 2], tmp_path) == {SFT: 1, ALIGNED: 15}
    for run in ("start", "aligned_seed=1"):
        jsonl.write_atomic(tmp_path / "runs" / run / "summary.json", "{}")
    assert missing(all_of, [0, 1], tmp_path) == {SFT: 4, ALIGNED: 9}


def test_all_of_tiny_takes_under_three_hours_by_what_was_measured(tmp_path):
    scale = SCALES["tiny"]
    left = Countdown(missing(ENTRIES.values(), [0, 1, 2], tmp_path), scale.seconds).seconds_left()
    assert 3600 < left < 3 * 3600


def test_a_scale_says_which_tables_it_lacks():
    def lacked(scale):
        return {name for name, entry in ENTRIES.items() if SCALES[scale].lacks(entry, SCALES[scale].config())}

    assert lacked("tiny") == {"out_of_domain"}
    assert lacked("3b") == {"sizes"}
    assert lacked("smollm2") == {"sizes", "chain"}


@pytest.mark.parametrize("name", SCALES)
def test_every_model_of_a_scale_has_settings(name):
    scale = SCALES[name]
    config = scale.config()
    methods = {
        m.name: m for entry in ENTRIES.values() if not scale.lacks(entry, config) for m in entry.methods
    }
    for method in methods.values():
        make_settings(with_values(config, dict((*method.asked, *method.cold, *method.change))))


def test_the_tasks_that_nothing_is_trained_on_are_in_the_published_files(shared):
    scale = SCALES["0.5b"]
    root = {"data.root": str(shared / "data" / "gtalign"), "data.test_per_task": 20}
    data = make_settings(with_values(scale.config(), {**dict(scale.unseen), **root})).data
    items = sources.load_items(data, run_tasks(data), sources.TEST)
    assert Counter(item.task for item in items) == dict.fromkeys(data.tasks, 20)
    assert not any(item.seen for item in items)


def test_time_left_goes_by_what_models_took(capsys):
    times = iter([0.0, 100.0, 100.0, 130.0])
    countdown = Countdown({SFT: 1, ALIGNED: 3}, {SFT: 60.0}, clock=lambda: next(times))
    with countdown.model(SFT, "start"):
        pass
    with countdown.model(ALIGNED, "a"):
        pass
    assert countdown.seconds_left() == 60.0
    assert capsys.readouterr().err.splitlines() == [
        "to train: cold starts 1, alignments 3",
        "model 1 of 4: start",
        "model 2 of 4: a",
    ]


def test_a_study_is_a_sheet_and_then_a_table(tmp_path, capsys):
    entry = ENTRIES["user_study"]
    for number, method in enumerate(entry.methods):
        folder = tmp_path / "evaluations" / method.folder(0)
        lines = [{"input": f"q{i}", "output": f"a {i}", "utility": 0.1 * number + 0.01 * i} for i in range(6)]
        jsonl.write(folder / "rollouts" / "model_0.jsonl", lines)
        jsonl.write_atomic(folder / "summary.json", "{}")
    flags = ["--scale=smoke", "--table=user_study", f"--workdir={tmp_path}"]
    paper.main(flags)
    assert "fill in user_study_sheet.csv" in capsys.readouterr().out
    sheet = tmp_path / "tables" / "user_study_sheet.csv"
    rows = list(csv.DictReader(sheet.open()))
    assert len(rows) == 6 * len(entry.methods)
    order = [method.name for method in entry.methods]
    filled = tmp_path / "filled.csv"
    with filled.open("w", newline="") as sink:
        writer = csv.DictWriter(sink, rows[0])
        writer.writeheader()
        for row in rows[1:]:
            writer.writerow({**row, "rating": 1 + order.index(row["method"])})
        writer.writerow(rows[0])  # nobody rated this one
    paper.main([*flags, f"--ratings={filled}"])
    assert "**held**" in capsys.readouterr().out
    filled.write_text("item,method,rating\n0,sft,five\n0,nobody,5\n")
    with pytest.raises(SystemExit):
        paper.main([*flags, f"--ratings={filled}"])
    said = capsys.readouterr().err
    assert "line 2: rating 'five' is no number; line 3: there is no answer of method 'nobody'" in said
