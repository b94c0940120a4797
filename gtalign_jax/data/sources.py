"""The published datasets: parquet files of one folder per task, read into items."""

import dataclasses
import pathlib
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from gtalign_jax.data.item import SOURCE_TO_TASK, Item, item_of
from gtalign_jax.errors import UserError

TASKS = tuple(SOURCE_TO_TASK.values())  # each in the folder of its name
# What an item needs; the other columns differ in type between files.
_COLUMNS = ["prompt", "data_source", "reward_model", "extra_info"]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """items, in file order; empty: rows dropped because their last message is empty."""

    items: list[Item]
    empty: int


def read_split(root: str, tasks: Iterable[str], split: str) -> Loaded:
    """Items of `root/TASK/SPLIT.parquet` for each task that has the split.

    Raises UserError for a missing root, a task without any file, or a row of an unknown task.
    """
    folder = pathlib.Path(root)
    if not root or not folder.is_dir():
        raise UserError(f"config.data.root={root!r}: no such folder; give the folder of the parquet files")
    items: list[Item] = []
    empty = 0
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"config.data.tasks: {task!r} is not a task; known: {', '.join(TASKS)}")
        path = folder / task / f"{split}.parquet"
        if not path.is_file():
            raise UserError(f"{path}: not found; leave {task!r} out of config.data.tasks or add the file")
        rows = read_rows(path)
        kept = [item for i, row in enumerate(rows) if (item := item_of(row, i, str(path))) is not None]
        items += kept
        empty += len(rows) - len(kept)
    return Loaded([dataclasses.replace(item, id=i) for i, item in enumerate(items)], empty)


def read_rows(path: pathlib.Path) -> list[dict]:
    """The rows of one parquet file as plain dictionaries."""
    try:
        return pq.read_table(path, columns=_COLUMNS).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


def mark_seen(test: list[Item], root: str) -> list[Item]:
    """Test items with `seen` set where the prompt stands in the task's training file, if there is one.

    The published math split leaks: its numbers measure memory in part, so unseen rows are reported apart.
    """
    tasks = dict.fromkeys(item.task for item in test)
    trained = [task for task in tasks if (pathlib.Path(root) / task / "train.parquet").is_file()]
    seen = {item.messages[-1]["content"] for item in read_split(root, trained, "train").items}
    return [dataclasses.replace(item, seen=item.messages[-1]["content"] in seen) for item in test]
