"""The published datasets: parquet files of one folder per task, read into items."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from gtalign_jax.data.item import Item, Readable, Record
from gtalign_jax.errors import UserError, naming

# What an item needs; the other columns differ in type between files.
_COLUMNS = ["prompt", "data_source", "reward_model", "extra_info"]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """items, in file order; empty: rows dropped because their last message is empty."""

    items: list[Item]
    empty: int


def read_split(root: str, tasks: Iterable[Readable], split: str) -> Loaded:
    """Items of `root/TASK/SPLIT.parquet` for each task that has the split.

    Raises UserError for a missing root, a task without any file, or a row of another task.
    """
    folder, tasks = pathlib.Path(root), list(tasks)
    if not root or not folder.is_dir():
        raise UserError(f"config.data.root={root!r}: no such folder; give the folder of the parquet files")
    items: list[Item] = []
    empty = 0
    for task in tasks:
        path = folder / task.name / f"{split}.parquet"
        if not path.is_file():
            raise UserError(
                f"{path}: not found; leave {task.name!r} out of config.data.tasks or add the file"
            )
        rows = read_rows(path)
        kept = [item for i, row in enumerate(rows) if (item := item_of(row, tasks, i, str(path))) is not None]
        items += kept
        empty += len(rows) - len(kept)
    return Loaded([dataclasses.replace(item, id=i) for i, item in enumerate(items)], empty)


def item_of(record: Record, tasks: Sequence[Readable], id: int, where: str) -> Item | None:
    """The item of a published row by the task that reads its data_source; None when it is not for that task.

    Raises UserError naming the file, the row and the column that is not as it must be.
    """
    where = f"{where}, row {id}"
    known: Mapping[str, Readable] = {task.source: task for task in tasks}
    source = record["data_source"]
    if source not in list(known):
        raise UserError(f"{where}: data_source {source!r} is not a known task; known: {', '.join(known)}")
    with naming(f"{where}: "):
        item = known[source].read(record)
    return item and dataclasses.replace(item, id=id, task=known[source].name, source=source)


def read_rows(path: pathlib.Path) -> list[dict]:
    """The rows of one parquet file as plain dictionaries."""
    try:
        return pq.read_table(path, columns=_COLUMNS).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


def mark_seen(test: list[Item], root: str, tasks: Mapping[str, Readable]) -> list[Item]:
    """Test items with `seen` set where the prompt stands in the task's training file, if there is one.

    The published math split leaks: its numbers measure memory in part, so unseen rows are reported apart.
    """
    names = dict.fromkeys(item.task for item in test)
    trained = [tasks[name] for name in names if (pathlib.Path(root) / name / "train.parquet").is_file()]
    seen = {item.messages[-1]["content"] for item in read_split(root, trained, "train").items}
    return [dataclasses.replace(item, seen=item.messages[-1]["content"] in seen) for item in test]
