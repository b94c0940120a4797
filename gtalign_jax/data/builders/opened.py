"""Rows of TFDS data sets by their number, read from ArrayRecord files as they are asked for.

A place is NAME[:FOLDER]. The data set of a task is FOLDER/NAME/TASK/VERSION, the newest version; a NAME that
holds versions itself is one data set for all tasks. FOLDER is TFDS's own where none is named. Data sets of
others serve too, with the features that they have, if their files are ArrayRecord.
"""

import bisect
import dataclasses
import itertools
import json
import os
import pathlib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from gtalign_jax.data.builders.records import FEATURES
from gtalign_jax.data.item import Row
from gtalign_jax.errors import UserError
from gtalign_jax.files import paths

_AT_ONCE = 256  # rows in memory at a time
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_RAW = tfds.core.decode.DeserializeMethod.RAW_BYTES


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One split of a data set. task: the folder it stands in, "" where that names none. records: serialised
    examples by number. features: of a data set that is not ours."""

    where: str
    task: str
    records: Any
    features: Any = None

    def __len__(self) -> int:
        return len(self.records)

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """The rows of these numbers, in their order; UserError where a file is damaged."""
        try:
            examples = self.records.__getitems__(list(numbers))
            return [self._row(i, example) for i, example in zip(numbers, examples, strict=True)]
        except (OSError, ValueError, RuntimeError, IndexError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{self.where}: cannot be read ({reason}); build it again") from error

    def _row(self, number: int, data: bytes) -> Row:
        where = f"{self.where}, row {number}"
        if self.features is not None:
            record = _plain(self.features.deserialize_example_np(data), self.features)
            return Row(where, record, task=self.task)
        example = tf_example_pb2.Example.FromString(data).features.feature
        return Row(
            where,
            json.loads(example["record"].bytes_list.value[0]),
            task=self.task,
            published=bool(example["published"].int64_list.value[0]),
            seen=bool(example["seen"].int64_list.value[0]),
        )


@dataclasses.dataclass(frozen=True)
class DataSets:
    """The rows of several data sets under one numbering, one set after the other."""

    parts: tuple[DataSet, ...]

    @property
    def counts(self) -> list[int]:
        """Rows of each part."""
        return [len(part) for part in self.parts]

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """The rows of these numbers, in their order."""
        ends = list(itertools.accumulate(self.counts))
        found: dict[int, Row] = {}
        of_part = [(bisect.bisect_right(ends, number), number) for number in numbers]
        for i, part in enumerate(self.parts):
            first = ends[i] - len(part)
            mine = [number for place, number in of_part if place == i]
            if mine:
                rows = part.rows([number - first for number in mine])
                found |= dict(zip(mine, rows, strict=True))
        return [found[number] for number in numbers]


def rows_in_order(place: str, split: str, tasks: Collection[str]) -> Iterator[Row]:
    """The rows of a split of these tasks, one data set after the other, in flat memory."""
    for part in open_sets(place, split, tasks).parts:
        for first in range(0, len(part), _AT_ONCE):
            yield from part.rows(range(first, min(first + _AT_ONCE, len(part))))


def open_sets(place: str, split: str, tasks: Collection[str]) -> DataSets:
    """A split of the data sets of these tasks; UserError names what is not there or cannot be opened."""
    name, folder = named_place(place)
    if (shared := _newest(folder / name)) is not None:  # of all tasks, so that its folder names none
        return DataSets((_open(shared, split, ""),))
    return DataSets(tuple(_open(version, split, task) for task, version in _versions(place, tasks).items()))


def with_split(place: str, split: str, tasks: Collection[str]) -> list[str]:
    """Those of the tasks whose data set has a split."""
    versions = _versions(place, tasks)
    return [task for task in tasks if any(versions[task].glob(f"*-{split}.array_record*"))]


def _versions(place: str, tasks: Collection[str]) -> dict[str, pathlib.Path]:
    """Task → the newest version of its data set, which may be one for all; UserError where there is none."""
    name, folder = named_place(place)
    base = folder / name
    found = {task: _newest(base) or _newest(base / task) for task in tasks}
    for task, version in found.items():
        if version is None:
            raise UserError(
                f"config.data.source=tfds:{place}: no data set {base / task}; build it with "
                f"python -m experiments.data --build={name}:{folder}, or name its folder as tfds:NAME:FOLDER"
            )
    return {task: version for task, version in found.items() if version is not None}


def named_place(place: str) -> tuple[str, pathlib.Path]:
    """(NAME, FOLDER) of NAME[:FOLDER]; UserError where the folder is not on a disk."""
    name, _, folder = place.partition(":")
    given = folder or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return name, paths.local(given, "the folder of TFDS data sets").expanduser().absolute()


def _newest(folder: pathlib.Path) -> pathlib.Path | None:
    """The newest version of a data set; None where there is none."""
    versions = [path for path in folder.glob("*") if _VERSION.fullmatch(path.name)]
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))), default=None)


def _open(version: pathlib.Path, split: str, task: str) -> DataSet:
    """A split of a data set."""
    try:
        builder = tfds.builder_from_directory(version)
        if split not in builder.info.splits:
            held = ", ".join(builder.info.splits)
            raise UserError(f"{version}: has no split {split!r}; name {held} in config.data.splits")
        source = builder.as_data_source(split, deserialize_method=_RAW)
    except UserError:
        raise
    except Exception as error:  # of many kinds, bare ones too
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{version}: cannot be opened ({reason}); build it again") from error
    features = builder.info.features
    ours = set(features) == set(FEATURES)
    return DataSet(f"{version}, split {split}", task, source.data_source, None if ours else features)


def _plain(value: Any, feature: Any) -> Any:
    """A decoded feature as JSON could hold it; a sequence of features is a list of objects."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _plain(value[name], inner) for name, inner in feature.items()}
    if isinstance(feature, tfds.features.Sequence) and isinstance(
        feature.feature, tfds.features.FeaturesDict
    ):
        columns = _plain(value, feature.feature)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return _text(value.tolist() if isinstance(value, np.ndarray | np.generic) else value)


def _text(value: Any) -> Any:
    """The same with text in place of bytes."""
    if isinstance(value, list | tuple):
        return [_text(each) for each in value]
    return value.decode() if isinstance(value, bytes) else value
