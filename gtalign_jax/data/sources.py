"""The items of a run: records of the embedded tasks, the published files or a source of one's own, read.

A record that is not as it must be is one line that names file, row and field. A task leaves out what is not
for it (an empty last message, an easier level); that is counted.
"""

import contextlib
import dataclasses
import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from gtalign_jax.data import synthetic
from gtalign_jax.data.config import DataConfig
from gtalign_jax.data.history import instructed, published_turns
from gtalign_jax.data.item import Item, Message, Readable, Record, Row, check_texts, shown
from gtalign_jax.data.records import KINDS, parquet_records
from gtalign_jax.errors import UserError
from gtalign_jax.files import drafts, paths

log = logging.getLogger(__name__)
# What an item of the published files needs; the other columns differ in type between files.
_COLUMNS = ("prompt", "data_source", "reward_model", "extra_info", "turn_id")
TRAIN, TEST = "train", "test"
ReadRow = Callable[[Row, int], Item | None]  # of a row and its number


class Known(Readable, synthetic.Embedded, Protocol):
    """What data needs to know of a task."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """items, in the order of their source; empty: records that their task left out. bad: lines about
    records that are not as they must be, where they were to be collected."""

    items: list[Item]
    empty: int
    bad: tuple[str, ...] = ()


def load_items(config: DataConfig, tasks: Mapping[str, Known], split: str) -> list[Item]:
    """The items of a split, `*_per_task` of each task; test items are marked where they were trained on."""
    limit = config.train_per_task if split == TRAIN else config.test_per_task
    loaded = read_source(config, tasks, split, limit)
    if loaded.empty:
        log.warning("%d records of %s are not for their task or empty, and left out", loaded.empty, split)
    items = loaded.items
    if config.decontaminate and split == TRAIN:
        items = _unseen(items, read_source(config, tasks, TEST, 0).items)
    if not items:
        raise UserError(f"config.data.source={config.source}: no item in split {config.split_name(split)!r}")
    return _mark_seen(config, tasks, items) if split == TEST else items


def read_source(
    config: DataConfig, tasks: Mapping[str, Known], split: str, limit: int, keep_going: bool = False
) -> Loaded:
    """At most `limit` items of each task (0: all) of a split, read from the source of the config.

    keep_going: collect what is wrong with records in `bad` instead of raising UserError at the first.
    """
    if config.source == "synthetic":
        embedded = embedded_rows(tasks.values(), split, limit, config.seed)
        return read_rows(embedded, reader(config, tasks), keep_going=keep_going)
    if config.source == "gtalign":
        loaded = _read_split(config, tasks.values(), split, keep_going)
        kept = _first_of_each(loaded.items, tasks, limit) if limit else loaded.items
        return dataclasses.replace(loaded, items=kept)
    _, rows_of = KINDS[config.kind]
    rows = rows_of(config.place, config.split_name(split), tasks)
    limits = dict.fromkeys(tasks, limit) if limit else {}
    belongs = in_split(split, config.test_share)
    with _naming_store(config):
        return read_rows(rows, reader(config, tasks), limits, keep_going, belongs)


def _naming_store(config: DataConfig) -> contextlib.AbstractContextManager[None]:
    """A store that does not let the source be read is a UserError that names it."""
    if config.kind == "tfds":  # which is on a disk
        return contextlib.nullcontext()
    return drafts.naming_store(paths.path(config.root if config.source == "gtalign" else config.place))


def embedded_rows(tasks: Iterable[synthetic.Embedded], split: str, count: int, seed: int) -> Iterator[Row]:
    """The rows of embedded tasks, as `synthetic.make_records`."""
    for i, record in enumerate(synthetic.make_records(list(tasks), split, count, seed)):
        yield Row(f"embedded tasks, row {i}", record, published=True)


def reader(config: DataConfig, tasks: Mapping[str, Readable]) -> ReadRow:
    """Reads a row of any source: one of the published files by its data_source, another as one's own."""
    anew = config.system if config.embedded or config.history != "given" else None
    published, own = _published_reader(tasks, anew), _own_reader(config, tasks)
    return lambda row, number: (published if row.published else own)(row, number)


def read_rows(
    rows: Iterable[Row],
    read: ReadRow,
    limits: Mapping[str, int] | None = None,
    keep_going: bool = False,
    belongs: Callable[[Row, Item], bool] = lambda row, item: True,
) -> Loaded:
    """The items of rows that belong to the split, numbered as they come; with limits, at most so many of each
    task, and no row more is read than that takes."""
    items: list[Item] = []
    bad: list[str] = []
    empty, left = 0, Counter(limits or {})
    for row in rows:
        try:
            item = read_row(row, read)
        except UserError as error:
            if not keep_going:
                raise
            bad.append(str(error))
            continue
        if item is None:
            empty += 1
        elif belongs(row, item) and (not limits or left[item.task] > 0):
            left[item.task] -= 1
            items.append(dataclasses.replace(item, id=len(items)))
            if limits and not +left:
                break
    return Loaded(items, empty, tuple(bad))


def read_row(row: Row, read: ReadRow, number: int = 0) -> Item | None:
    """The item of a row, with its number; UserError says where the row stands and what is wrong with it."""
    try:
        item = read(row, number)
        if item is not None:
            check_texts(item)
        return item
    except UserError:  # names its place already
        raise
    except ValueError as error:
        raise UserError(f"{row.where}: {error}") from error
    except KeyError as error:
        raise UserError(f"{row.where}: {error.args[0]}: missing") from error
    except (TypeError, AttributeError) as error:  # of a reader that met another type than it was made for
        raise UserError(f"{row.where}: cannot be read ({error}); mend or remove the row") from error


def _read_split(
    config: DataConfig, tasks: Iterable[Readable], split: str, keep_going: bool = False
) -> Loaded:
    """`read_split` as a config has it."""
    anew = None if config.history == "given" else config.system
    with _naming_store(config):
        return read_split(config.root, tasks, config.split_name(split), keep_going, anew)


def read_split(
    root: str, tasks: Iterable[Readable], split: str, keep_going: bool = False, anew: str | None = None
) -> Loaded:
    """Items of `root/TASK/SPLIT.parquet` for each task that has the split.

    anew: the instruction that conversations are written under in place of the rows' own prompts.
    Raises UserError for a missing root, a task without any file, or a row of another task.
    """
    folder, tasks = paths.path(root), list(tasks)
    if not root or not folder.is_dir():
        raise UserError(f"config.data.root={root!r}: no such folder; give the folder of the parquet files")
    rows: list[Row] = []
    for task in tasks:
        path = folder / task.name / f"{split}.parquet"
        if not path.is_file():
            raise UserError(
                f"{path}: not found; leave {task.name!r} out of config.data.tasks or add the file"
            )
        records = enumerate(parquet_records(path, _COLUMNS))
        rows += [Row(f"{path}, row {i}", record, published=True) for i, record in records]
    reader = _published_reader({task.name: task for task in tasks}, anew)
    return read_rows(rows, reader, keep_going=keep_going)


def prompt_key(item: Item) -> tuple[str, ...]:
    """What makes two prompts the same: all that was said, whatever the instruction before it."""
    return tuple(message["content"] for message in item.messages if message["role"] != "system")


def mark_seen(test: list[Item], trained: Iterable[Item]) -> list[Item]:
    """Test items with `seen` set where the prompt also stands among the training items.

    The published math split leaks: its numbers measure memory in part, so unseen rows are reported apart.
    """
    seen = {prompt_key(item) for item in trained}
    return [dataclasses.replace(item, seen=prompt_key(item) in seen) for item in test]


def _mark_seen(config: DataConfig, tasks: Mapping[str, Known], test: list[Item]) -> list[Item]:
    """`mark_seen` by what a run of this config could train on; nothing where the splits never meet."""
    if config.source == "synthetic":
        return test
    if config.kind == "tfds":  # whose rows know it
        return [dataclasses.replace(item, seen=item.seen and not config.decontaminate) for item in test]
    if config.source == "gtalign":
        asked = {name: tasks[name] for name in dict.fromkeys(item.task for item in test)}
        there = with_split(config, asked, TRAIN)
        trained = _read_split(config, there.values(), TRAIN).items
    else:
        trained = read_source(config, tasks, TRAIN, config.train_per_task).items
    return mark_seen(test, _unseen(trained, test) if config.decontaminate else trained)


def with_split(config: DataConfig, tasks: Mapping[str, Known], split: str) -> dict[str, Known]:
    """The tasks that have a split; of the published ones some are for evaluation alone."""
    if config.kind == "tfds":
        from gtalign_jax.data.builders import opened

        return {
            name: tasks[name] for name in opened.with_split(config.place, config.split_name(split), tasks)
        }
    if config.source != "gtalign":
        return dict(tasks)
    file, root = f"{config.split_name(split)}.parquet", paths.path(config.root)
    with _naming_store(config):
        return {name: task for name, task in tasks.items() if (root / name / file).is_file()}


def _unseen(train: list[Item], test: list[Item]) -> list[Item]:
    """Training items whose prompt does not stand in the test split."""
    held_out = {prompt_key(item) for item in test}
    kept = [item for item in train if prompt_key(item) not in held_out]
    if len(kept) < len(train):
        log.warning("%d training rows stand in the test split and are left out", len(train) - len(kept))
    return kept


def _first_of_each(items: list[Item], tasks: Mapping[str, Known], limit: int) -> list[Item]:
    return [item for task in tasks for item in [i for i in items if i.task == task][:limit]]


def _published_reader(tasks: Mapping[str, Readable], anew: str | None = None) -> ReadRow:
    """Reads a row of the published schema by the task that its data_source belongs to; anew: see
    `read_split`."""
    known = {task.source: task for task in tasks.values()}

    def read(row: Row, number: int) -> Item | None:
        source = row.record["data_source"]
        if source not in list(known):
            raise ValueError(f"data_source {source!r} is not a known task; known: {', '.join(known)}")
        item = known[source].read(row.record)
        if item is None:
            return None
        messages = item.messages if anew is None else instructed(published_turns(row.record), anew)
        if not messages[-1]["content"].strip():
            return None
        return _placed(item, row, number, messages, known[source])

    return read


def _own_reader(config: DataConfig, tasks: Mapping[str, Readable]) -> ReadRow:
    """Reads a record of a source of one's own, in the fields that it has there."""
    names = dataclasses.asdict(config.fields)
    changed = {ours: theirs for ours, theirs in names.items() if theirs != ours}

    def read(row: Row, number: int) -> Item | None:
        record = renamed(row.record, changed)
        task = _task_of(record, row.task, tasks)
        item = task.read(record)
        if item is None:
            return None
        if task.needs_truth and not item.ground_truth.strip():
            raise ValueError(
                f"truth: missing or empty, and task {task.name!r} needs one; give it, or map it with "
                "config.data.fields.truth"
            )
        return _placed(item, row, number, instructed(item.messages, config.system), task)

    return read


def _placed(item: Item, row: Row, number: int, messages: tuple[Message, ...], task: Readable) -> Item:
    """The item of a row as one of its task, with these messages, in its place."""
    return dataclasses.replace(
        item,
        id=number,
        messages=messages,
        source=task.source,
        task=task.name,
        seen=row.seen,
        where=row.where,
    )


def renamed(record: Record, changed: Mapping[str, str]) -> Record:
    """The record under the names that we read; ValueError for a field that the config names and it lacks.

    changed: our name → what it is called there.
    """
    for ours, theirs in changed.items():
        if theirs not in record:
            raise ValueError(f"{theirs}: missing; config.data.fields.{ours} names it")
    return {**record, **{ours: record[theirs] for ours, theirs in changed.items()}}


def _task_of(record: Record, folder: str, tasks: Mapping[str, Readable]) -> Readable:
    """The task that a record names, or its data_source, or its folder; else the run's only one."""
    name = record.get("task")
    if name is None and record.get("data_source") is not None:
        by_source = {task.source: task.name for task in tasks.values()}
        name = record["data_source"]
        name = by_source.get(name, name) if isinstance(name, str) else name
    if name is None:
        name = folder or (next(iter(tasks)) if len(tasks) == 1 else None)
    if name is None:
        raise ValueError(
            f"task: missing; the run has several ({', '.join(tasks)}), so each row names its own"
        )
    if name not in list(tasks):
        raise ValueError(f"task {shown(name)}: is not one of config.data.tasks ({', '.join(tasks)})")
    return tasks[name]


def in_split(split: str, test_share: float) -> Callable[[Row, Item], bool]:
    """Whether an item belongs to a split; in a file that holds both a hash of the prompt says so."""

    def belongs(row: Row, item: Item) -> bool:
        if not row.whole:
            return True
        held_out = zlib.crc32(json.dumps(prompt_key(item)).encode()) % 1000 < test_share * 1000
        return held_out == (split == TEST)

    return belongs
