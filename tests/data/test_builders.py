"""TFDS data sets of records: what was written is read back as it was, and what is wrong is one line."""

import datetime
import decimal
import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from gtalign_jax.data.builders.opened import open_sets, tfds_rows
from gtalign_jax.data.builders.records import write_records
from gtalign_jax.errors import UserError

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
