"""TFDS data sets of records: what was written is read back as it was, and what is wrong is one line."""

import dataclasses
import datetime
import decimal
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from gtalign_jax.data import sources
from gtalign_jax.data.builders.build import build
from gtalign_jax.data.builders.opened import open_sets
from gtalign_jax.data.builders.records import write_records
from gtalign_jax.data.config import DataConfig
from gtalign_jax.data.records import tfds_rows
from gtalign_jax.errors import UserError
from gtalign_jax.rewards.tasks import EMBEDDED, TASKS
from gtalign_jax.rewards.tasks.task import Task

ODD = [
    {"question": "Why é \ud800?", "truth": [None, 1, 1.5, True], "nested": {"a": [{"b": None}, {}]}},
    {"another": "schema"},
    {},
]


def records_of(folder, split):
    """The records of a data set, read by TFDS alone."""
    source = tfds.builder_from_directory(folder).as_data_source(split)
    return [json.loads(source[i]["record"]) for i in range(len(source))]


def test_records_are_kept_as_they_are_in_their_order(tmp_path, capfd):
    many = [{"row": i} for i in range(500)]
    folder = write_records(tmp_path, "own", "my.task-1", {"train": iter(many), "test": ODD})
    assert folder == tmp_path / "own" / "my.task-1" / "1.0.0"
    assert records_of(folder, "train") == many and records_of(folder, "test") == ODD
    assert "tensorflow" not in sys.modules
    assert capfd.readouterr() == ("", "")


def test_decimals_and_dates_are_kept_as_text(tmp_path):
    row = {"truth": decimal.Decimal("1.50"), "day": datetime.date(2026, 1, 31)}
    folder = write_records(tmp_path, "own", "task", {"train": [row]})
    assert records_of(folder, "train") == [{"truth": "1.50", "day": "2026-01-31"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "own/task: split 'train' has no row"),
        ([{"a": 1}, {"a": b"x"}], "own/task, split train, row 1: b'x': a bytes cannot be kept; make it text"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, rows, message):
    with pytest.raises(UserError, match=message) as error:
        write_records(tmp_path, "own", "task", {"train": rows})
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_data_set_that_is_there_stays(tmp_path):
    write_records(tmp_path, "own", "task", {"train": [{"a": 1}]})
    with pytest.raises(UserError, match="own/task/1.0.0: is there already; remove it"):
        write_records(tmp_path, "own", "task", {"train": [{"a": 2}]})
    assert records_of(tmp_path / "own" / "task" / "1.0.0", "train") == [{"a": 1}]


def test_rows_are_read_by_their_number(tmp_path):
    for task, count in (("first", 5), ("second", 3)):
        write_records(tmp_path, "own", task, {"train": [{task: i} for i in range(count)]})
    found = open_sets(f"own:{tmp_path}", "train", ["second", "first"])
    assert found.counts == [3, 5]
    rows = found.rows([4, 0, 2, 7])
    assert [row.record for row in rows] == [{"first": 1}, {"second": 0}, {"second": 2}, {"first": 4}]
    assert [row.task for row in rows] == ["first", "second", "second", "first"]
    assert rows[0].where == f"{tmp_path}/own/first/1.0.0, split train, row 1"
    assert [row.record for row in tfds_rows(f"own:{tmp_path}", "train", ["second"])] == [
        {"second": i} for i in range(3)
    ]


class Others(tfds.core.GeneratorBasedBuilder):
    """A data set that somebody else made, with features of its own."""

    VERSION = tfds.core.Version("2.10.0")
    code_path = None

    def _info(self):
        text = tfds.features.Text()
        turns = tfds.features.Sequence({"role": text, "content": text})
        features = {"ask": text, "turns": turns, "n": np.int64, "grades": tfds.features.Sequence(np.float32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples()}

    def _generate_examples(self):
        turns = [{"role": "user", "content": "é"}, {"role": "assistant", "content": ""}]
        yield 0, {"ask": "Why?", "turns": turns, "n": 3, "grades": [0.5, 1.0]}


def test_a_data_set_of_others_is_read_with_its_features(tmp_path):
    Others(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    (row,) = tfds_rows(f"others:{tmp_path}", "validation", ["any"])
    turns = [{"role": "user", "content": "é"}, {"role": "assistant", "content": ""}]
    assert row.record == {"ask": "Why?", "turns": turns, "n": 3, "grades": [0.5, 1.0]} and row.task == ""


def damaged(folder):
    return next(folder.glob("own-train*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: damaged(f).write_bytes(damaged(f).read_bytes()[:70_000]), "split train: cannot be read"),
        (lambda f: damaged(f).write_bytes(b""), "split train: cannot be read"),
        (lambda f: damaged(f).unlink(), "split train: cannot be read .*No such file"),
        (lambda f: (f / "dataset_info.json").write_text("{"), "cannot be opened"),
        (lambda f: (f / "features.json").unlink(), "cannot be opened"),
    ],
)
def test_what_is_damaged_is_one_line_that_names_it(tmp_path, damage, message):
    folder = write_records(
        tmp_path, "own", "task", {"train": [{"a": "x" * 400 + str(i)} for i in range(900)]}
    )
    damage(folder)
    with pytest.raises(UserError, match=f"own/task/1.0.0.*{message}.*; build it again") as error:
        list(tfds_rows(f"own:{tmp_path}", "train", ["task"]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "split", "message"),
    [
        ("nobody", "train", "no data set .*/nobody/task; build it with .* --build=nobody:/"),
        ("own", "dev", "has no split 'dev'; name train in config.data.splits"),
    ],
)
def test_what_is_not_there_is_one_line(tmp_path, place, split, message):
    write_records(tmp_path, "own", "task", {"train": [{"a": 1}]})
    with pytest.raises(UserError, match=message):
        open_sets(f"{place}:{tmp_path}", split, ["task"])


# --- a config's data, built -------------------------------------------------------------------------


def config_of(source, tasks, **fields):
    fields = {"train_per_task": 0, "test_per_task": 0} | fields
    return DataConfig(source=source, tasks=tuple(tasks), **fields)


def as_built(items):
    """Items without what says where they stand."""
    return [dataclasses.replace(item, id=0) for item in items]


def test_the_embedded_tasks_come_back_row_for_row(tmp_path):
    limits = {"train_per_task": 20, "test_per_task": 5}
    plain = config_of("synthetic", EMBEDDED, **limits)
    folders = build(plain, EMBEDDED, "embedded", tmp_path)
    assert [folder.parent.name for folder in folders] == list(EMBEDDED)
    built = config_of(f"tfds:embedded:{tmp_path}", EMBEDDED, **limits)
    assert built.embedded and not built.streamed
    for split in ("train", "test"):
        for task in EMBEDDED:
            one = {task: EMBEDDED[task]}
            made = sources.embedded_rows(one.values(), split, limits[f"{split}_per_task"], 0)
            found = tfds_rows(f"embedded:{tmp_path}", split, one)
            assert [row.record for row in found] == [row.record for row in made]
            items = [sources.load_items(config, one, split) for config in (plain, built)]
            assert as_built(items[0]) == as_built(items[1]) and items[0]


def test_the_seven_published_tasks_come_back_row_for_row(shared, tmp_path):
    """Every column of every row, and the items with what is known of them, the leaked test rows too."""
    root = str(shared / "data" / "gtalign")
    plain = config_of("gtalign", TASKS, root=root)
    build(plain, TASKS, "gtalign", tmp_path)
    built = config_of(f"tfds:gtalign:{tmp_path}", TASKS)
    for split in ("train", "test"):
        there = sources.with_split(plain, TASKS, split)
        assert list(sources.with_split(built, TASKS, split)) == list(there)
        for name, task in there.items():
            want = pq.read_table(f"{root}/{name}/{split}.parquet").to_pylist()
            assert [row.record for row in tfds_rows(f"gtalign:{tmp_path}", split, [name])] == want
            one = {name: task}
            found = [as_built(sources.load_items(config, one, split)) for config in (plain, built)]
            assert found[0] == found[1]
    math = sources.load_items(built, {"math": TASKS["math"]}, "test")
    assert sum(item.seen for item in math) == 274


OWN = {"own": Task(name="own"), "open": Task(name="open", needs_truth=False)}


def test_a_users_file_is_built_by_task_and_split(tmp_path):
    file = tmp_path / "q.jsonl"
    rows = [{"question": f"What of {i}?", "truth": i, "task": ("own", "open")[i % 2]} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = config_of(f"jsonl:{file}", OWN)
    build(plain, OWN, "mine", tmp_path / "sets")
    built = config_of(f"tfds:mine:{tmp_path / 'sets'}", OWN)
    for split in ("train", "test"):
        items = [sources.load_items(config, OWN, split) for config in (plain, built)]
        assert sorted(i.intent for i in items[0]) == sorted(i.intent for i in items[1])
        assert [i.task for i in items[1]] == sorted((i.task for i in items[1]), key=list(OWN).index)


def test_of_a_split_as_many_as_are_asked_for_are_read(tmp_path):
    write_records(tmp_path, "mine", "own", {"train": [{"question": f"{i}?", "truth": i} for i in range(9)]})
    config = config_of(f"tfds:mine:{tmp_path}", ["own"], train_per_task=4)
    items = sources.load_items(config, {"own": OWN["own"]}, "train")
    assert [item.ground_truth for item in items] == ["0", "1", "2", "3"]
    assert items[3].where == f"{tmp_path}/mine/own/1.0.0, split train, row 3"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"truth": 1}, "row 17: neither question nor messages"),
        ({"question": 3, "truth": 1}, "row 17: question 3: must be text"),
        ({"question": "Why?"}, "row 17: truth: missing or empty, and task 'own' needs one"),
        ({"question": "Why?", "truth": {"a": 1}}, "row 17: truth {'a': 1}: must be one text or number"),
    ],
)
def test_a_bad_row_is_named_when_it_is_read_and_when_it_is_built(tmp_path, row, message):
    rows = [{"question": f"{i}?", "truth": i} for i in range(17)] + [row]
    write_records(tmp_path, "mine", "own", {"train": rows, "test": rows[:2]})
    config = config_of(f"tfds:mine:{tmp_path}", ["own"])
    one = {"own": OWN["own"]}
    for attempt in (
        lambda: sources.load_items(config, one, "train"),
        lambda: build(config, one, "other", tmp_path),
    ):
        with pytest.raises(UserError, match=f"mine/own/1.0.0, split train, {message}") as error:
            attempt()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("synthetic", "mine", "--build=mine: the data sets of source synthetic are named embedded"),
        ("jsonl:/x", "gtalign", "--build=gtalign: that is the name of the data that comes with us"),
        ("gtalign", "gtalign", "no data of task 'own'; leave it out of config.data.tasks, or see that"),
    ],
)
def test_what_cannot_be_built_is_one_line(tmp_path, source, name, message):
    with pytest.raises(UserError, match=message):
        build(config_of(source, OWN), OWN, name, tmp_path)
