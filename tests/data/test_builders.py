"""TFDS data sets of records: what was written is read back as it was, and what is wrong is one line."""

import datetime
import decimal
import json
import sys

import pytest
import tensorflow_datasets as tfds

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
    folder = write_records(tmp_path, "own", "my.task-1", {"train": lambda: iter(many), "test": lambda: ODD})
    assert folder == tmp_path / "own" / "my.task-1" / "1.0.0"
    assert records_of(folder, "train") == many and records_of(folder, "test") == ODD
    assert "tensorflow" not in sys.modules
    assert capfd.readouterr() == ("", "")


def test_decimals_and_dates_are_kept_as_text(tmp_path):
    row = {"truth": decimal.Decimal("1.50"), "day": datetime.date(2026, 1, 31)}
    folder = write_records(tmp_path, "own", "task", {"train": lambda: [row]})
    assert records_of(folder, "train") == [{"truth": "1.50", "day": "2026-01-31"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "No examples were yielded"),
        ([{"a": 1}, {"a": b"x"}], "own/task, split train, row 1: b'x': a bytes cannot be kept; make it text"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, rows, message):
    with pytest.raises(UserError, match=message) as error:
        write_records(tmp_path, "own", "task", {"train": lambda: rows})
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_data_set_that_is_there_stays(tmp_path):
    write_records(tmp_path, "own", "task", {"train": lambda: [{"a": 1}]})
    with pytest.raises(UserError, match="own/task/1.0.0: is there already; remove it"):
        write_records(tmp_path, "own", "task", {"train": lambda: [{"a": 2}]})
    assert records_of(tmp_path / "own" / "task" / "1.0.0", "train") == [{"a": 1}]
