"""A TFDS builder of records: each row is kept as its source held it, as JSON, in the source's order.

A data set is FOLDER/NAME/TASK/VERSION: one of TFDS's configs for each task, so that tasks can be mixed. A
record is one text, because records of different sources have different fields, nulls and nested lists, for
which TFDS has no types.
"""

import contextlib
import datetime
import decimal
import functools
import io
import json
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from gtalign_jax.data.item import Record, Row, shown
from gtalign_jax.errors import UserError, naming

VERSION = "1.0.0"
FEATURES = {
    "record": tfds.features.Text(doc="A record as JSON, with the fields that it had in its source."),
    "published": tfds.features.Scalar(np.bool_, doc="Whether it is a row of the published files."),
    "seen": tfds.features.Scalar(np.bool_, doc="Whether its prompt, of a test row, stands in train."),
}
Splits = Mapping[str, Callable[[], Iterable[Row]]]


class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes the rows of a task. splits: name → its rows, read when the split is written."""

    VERSION = tfds.core.Version(VERSION)
    code_path = None  # no file of checksums lies beside this code, and TFDS needs not look for one

    def __init__(self, name: str, task: str, splits: Splits, folder: pathlib.Path) -> None:
        self.name = name
        self._splits = splits
        config = tfds.core.BuilderConfig(name=task, version=VERSION)
        super().__init__(config=config, data_dir=folder, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(FEATURES)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, row in enumerate(self._splits[split]()):
            with naming(f"{row.where}: "):
                yield i, {"record": encoded(row.record), "published": row.published, "seen": row.seen}


def write_records(
    folder: pathlib.Path, name: str, task: str, splits: Mapping[str, Iterable[Record]]
) -> pathlib.Path:
    """Write records as the data set NAME/TASK, as `write_rows` does."""

    def rows(split: str) -> Iterator[Row]:
        for i, record in enumerate(splits[split]):
            yield Row(f"{name}/{task}, split {split}, row {i}", record)

    return write_rows(folder, name, task, {split: functools.partial(rows, split) for split in splits})


def write_rows(folder: pathlib.Path, name: str, task: str, splits: Splits) -> pathlib.Path:
    """Write the data set NAME/TASK, and give its folder, which is there once all of it is written.

    folder: on a disk. splits: `train` and `test`, or as they are to be called. UserError for a split without
    rows, a data set that is there already, and a record that cannot be kept.
    """
    with _quiet():
        builder = Records(name, task, splits, folder)
        made = pathlib.Path(builder.data_path)
        if made.exists():
            raise UserError(f"{made}: is there already; remove it, or give another name")
        try:
            builder.download_and_prepare()
        except AssertionError as error:  # of a split without records
            empty = next((split for split in splits if f'"{split}"' in str(error)), "")
            raise UserError(
                f"{name}/{task}: split {empty!r} has no row; leave the task out, or give it some"
            ) from error
        finally:
            downloads = folder / "downloads"
            _remove_empty(downloads / "extracted", downloads, made.parent, made.parent.parent)
    return made


def encoded(record: Record) -> bytes:
    """A record as JSON; half a surrogate pair as its escape, decimal numbers and dates as text.

    ValueError for a value that JSON has no place for.
    """
    text = json.dumps(record, ensure_ascii=False, default=_as_text, separators=(",", ":"))
    return text.encode(errors="backslashreplace")


def _as_text(value: Any) -> str:
    if isinstance(value, decimal.Decimal | datetime.date | datetime.time):
        return str(value)
    raise ValueError(f"{shown(value)}: a {type(value).__name__} cannot be kept; make it text")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS without its words and bars for those who call it by hand."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logger.setLevel(level)


def _remove_empty(*folders: pathlib.Path) -> None:
    """Remove the folders in which nothing was left."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
