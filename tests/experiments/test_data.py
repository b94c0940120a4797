"""`experiments.data`: the report of a config's data, for people and as JSON."""

import json
import sys

import pytest

from experiments.data import main

TINY = "--config=configs/quickstart.py:tiny"


def run(capsys, *flags):
    main(["data", TINY, *flags])
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "tasks_for_data.py").write_text(
        "from gtalign_jax.rewards.tasks.task import Task\nOWN = Task('own')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for split, rows in (("train", range(9)), ("test", range(7, 12))):
        lines = [{"question": f"What is the name of part {i}?", "truth": i} for i in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    yield tmp_path
    sys.modules.pop("tasks_for_data", None)


def own(folder, *flags):
    return f"--config.data.source=jsonl:{folder}", "--config.data.tasks=('tasks_for_data:OWN',)", *flags


def test_a_users_files_are_described_whole(folder, capsys):
    flags = own(folder, "--config.data.train_per_task=4", "--config.buckets.prompt=(8,64)", "--json")
    found = json.loads(run(capsys, *flags))
    train, test = (found["tasks"]["own"]["splits"][split] for split in ("train", "test"))
    assert (train["rows"], test["rows"]) == (9, 5)
    assert found["tasks"]["own"]["leaks"]["rows"] == 2 and found["bad"] == {"rows": 0, "lines": []}
    assert train["buckets"]["8"]["longer"] == 9 and train["dropped"] == 0
    assert train["tokens"]["min"] > 8
    text = run(capsys, *own(folder))
    assert "of 5 test rows, 2 (2 prompts) stand in train" in text


def test_bad_rows_are_listed_and_the_others_described(folder, capsys):
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"question": 3}\n{"question": "Why?"}\n')
    text = run(capsys, *own(folder))
    assert "2 records cannot be read:" in text
    assert f"  {folder / 'train.jsonl'}:10: question 3: must be text" in text
    assert "train 9 rows" in text


def talk(turns, words):
    said = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i} " * words} for i in range(2 * turns)]
    return {"messages": [*said, {"role": "user", "content": "What then?"}], "truth": "x"}


def test_histories_that_are_cut_and_prompts_that_are_dropped_are_named(folder, capsys):
    rows = [talk(0, 1), talk(3, 9), talk(1, 1), {"question": "Why " * 99, "truth": "x"}]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = own(folder, "--config.buckets.prompt=(128,)")
    dropped = [f"{folder / 'test.jsonl'}:{row}" for row in (2, 4)]
    for too_long, cut, names in (("drop", 0, dropped), ("cut", 1, dropped[1:])):
        more = f"--config.data.too_long={too_long}"
        test = json.loads(run(capsys, *flags, more, "--json"))["tasks"]["own"]["splits"]["test"]
        assert (test["cut"], test["dropped"], test["dropped_rows"]) == (cut, len(names), names)
        text = run(capsys, *flags, more)
        assert f"dropped: {'; '.join(names)}" in text and ("1 prompts lose" in text) == cut


def test_the_embedded_tasks_share_nothing(capsys):
    found = json.loads(run(capsys, "--json"))
    assert list(found["tasks"]) == ["math", "medium", "ambig_qa", "wildguard"]
    for task in found["tasks"].values():
        assert task["splits"]["train"]["rows"] == 16 and task["splits"]["test"]["rows"] == 2
        assert task["leaks"]["rows"] == 0


def test_the_data_of_a_config_is_built_and_described_as_before(folder, capsys, tmp_path):
    place = f"mine:{tmp_path / 'sets'}"
    made = run(capsys, *own(folder), f"--build={place}").splitlines()
    assert made == [f"{tmp_path}/sets/mine/own/1.0.0"]
    plain, built = (
        json.loads(run(capsys, f"--config.data.source={source}", tasks, "--json"))
        for source, tasks in (
            (f"jsonl:{folder}", own(folder)[1]),
            (f"tfds:{place}", own(folder)[1]),
        )
    )
    assert plain["tasks"] == built["tasks"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--build=mine", "--build=mine: the data sets of source synthetic are named embedded"),
        ("--build=embedded:gs://bucket/sets", "must be on a local disk, not on a store"),
        ("--config.data.source=tfds:none:/nowhere", "no data set /nowhere/none/math; build it with"),
        ("--config.data.source=jsonl:/nowhere", "config.data.source: /nowhere: no such file or folder"),
        ("--config.data.tasks=('poetry',)", "config.data.tasks: 'poetry' is not a task"),
        ("--nothing", "Unknown command line flag"),
    ],
)
def test_what_cannot_be_described_is_one_line(capsys, flag, message):
    with pytest.raises(SystemExit) as stop:
        main(["data", TINY, flag])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1
