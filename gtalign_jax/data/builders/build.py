"""The data of a config as TFDS data sets, one a task: the seven published, the embedded, or one's own."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping

from gtalign_jax.data import sources
from gtalign_jax.data.builders.records import write_rows
from gtalign_jax.data.config import EMBEDDED, PUBLISHED, DataConfig
from gtalign_jax.data.item import Item, Row
from gtalign_jax.data.records import KINDS, parquet_rows
from gtalign_jax.data.sources import TEST, TRAIN, Known
from gtalign_jax.errors import UserError
from gtalign_jax.files import paths

_NAMES = {"synthetic": EMBEDDED, "gtalign": PUBLISHED}  # source → what its data sets are called
Tasks = Mapping[str, Known]


def build(config: DataConfig, tasks: Tasks, name: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """Write the data set NAME/TASK of each task with the splits that it has; returns their folders.

    Every row is read as a run would read it, and UserError names one that is wrong. Files are read whole;
    embedded questions and those of the hub as far as `*_per_task` says.
    """
    wanted = _NAMES.get(config.source)
    if wanted and name != wanted:
        raise UserError(f"--build={name}: the data sets of source {config.source} are named {wanted}")
    if not wanted and name in _NAMES.values():
        raise UserError(f"--build={name}: that is the name of the data that comes with us; choose another")
    splits = {task: _splits(config, tasks, task) for task in tasks}
    for task, found in splits.items():
        if not found:
            raise UserError(
                f"config.data.source={config.source}: there is no data of task {task!r}; leave it out of "
                "config.data.tasks, or see that config.data.root names its folder"
            )
    return [write_rows(folder, name, task, found) for task, found in splits.items()]


def _splits(config: DataConfig, tasks: Tasks, task: str) -> dict[str, Callable[[], Iterator[Row]]]:
    """Split → the rows of a task. A test row is marked whose prompt was met while the training rows, which
    come first, were read."""
    there = [split for split in (TRAIN, TEST) if task in sources.with_split(config, tasks, split)]
    met: set[tuple[str, ...]] = set()

    def train() -> Iterator[Row]:
        tested = _read(config, tasks, task, TEST) if TEST in there else ()
        asked = {sources.prompt_key(item) for _, item in tested if item}
        for row, item in _read(config, tasks, task, TRAIN):
            if item and sources.prompt_key(item) in asked:
                met.add(sources.prompt_key(item))
            yield row

    def test() -> Iterator[Row]:
        for row, item in _read(config, tasks, task, TEST):
            yield dataclasses.replace(row, seen=bool(item and sources.prompt_key(item) in met))

    return {split: {TRAIN: train, TEST: test}[split] for split in there}


def _read(config: DataConfig, tasks: Tasks, task: str, split: str) -> Iterator[tuple[Row, Item | None]]:
    """The rows of a task in a split with their items; None for a published row that its task leaves out."""
    read, belongs = sources.reader(config, tasks), sources.in_split(split, config.test_share)
    limit = (config.train_per_task if split == TRAIN else config.test_per_task) if config.kind == "hub" else 0
    pairs = ((row, sources.read_row(row, read)) for row in _rows(config, tasks, task, split))
    mine = (
        (row, item)
        for row, item in pairs
        if row.published or (item and item.task == task and belongs(row, item))
    )
    yield from itertools.islice(mine, limit or None)


def _rows(config: DataConfig, tasks: Tasks, task: str, split: str) -> Iterator[Row]:
    """The rows of a source among which those of a task are."""
    limit = config.train_per_task if split == TRAIN else config.test_per_task
    if config.source == "synthetic":
        yield from sources.embedded_rows([tasks[task]], split, limit, config.seed)
    elif config.source == "gtalign":
        file = paths.path(config.root) / task / f"{config.split_name(split)}.parquet"
        for row in parquet_rows(str(file), split):
            yield dataclasses.replace(row, whole=False, published=True)
    else:
        _, rows_of = KINDS[config.kind]
        yield from rows_of(config.place, config.split_name(split), tasks)
