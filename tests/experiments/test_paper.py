"""`experiments.paper` as a researcher calls it: a table from nothing, the same again, and bad input."""

import json

import pytest

from experiments import paper
from gtalign_jax import jsonl


def test_a_table_from_nothing_and_the_same_again(tmp_path, capsys, monkeypatch):
    flags = ["--scale=smoke", "--table=efficiency", "--seeds=0", f"--workdir={tmp_path}"]
    paper.main(flags)
    printed = capsys.readouterr().out
    assert printed.startswith("## efficiency")
    found = json.loads((tmp_path / "tables" / "efficiency.json").read_text())
    assert set(found["rows"]) == {"sft", "cobb_douglas"}
    assert found["differences"]["sft"]["prompts"] == 8
    assert found["verdict"] in ("held", "did not hold", "undecided")
    assert "| efficiency | more answer quality" in (tmp_path / "claims.md").read_text()
    assert "<svg" in (tmp_path / "tables" / "efficiency.svg").read_text()
    monkeypatch.setattr(paper, "train_start", None)  # nothing is trained again
    paper.main(flags)
    assert capsys.readouterr().out == printed
    # Another table takes the models that are there; these write no matrix.
    paper.main([flags[0], "--table=choice_rule", *flags[2:]])
    assert "No answer holds what this table is made of." in capsys.readouterr().out


def test_games_need_no_model(tmp_path, capsys):
    paper.main(["--scale=smoke", "--table=games", f"--workdir={tmp_path}"])
    assert "bargaining: first keeps" in capsys.readouterr().out
    assert jsonl.read_object(tmp_path / "tables" / "games.json")["verdict"] == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--table=nosuch"], "--table=nosuch: no such table; use baselines"),
        (["--table=games", "--seeds=0,0"], "--seeds: 0 stands there twice"),
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
