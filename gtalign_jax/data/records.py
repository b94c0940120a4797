"""Records of other people's data, one at a time, each with where it stands.

A kind of source is a function `(place, split, tasks) → Iterator[Row]`; of a source that says whose its rows
are before they are read, only those of these tasks come. A place of files is one file, which holds both
splits, or a folder with a file of each split, `SPLIT.jsonl` or `TASK/SPLIT.jsonl`.
"""

import itertools
import json
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gtalign_jax import jsonl
from gtalign_jax.data.item import Record, Row, shown
from gtalign_jax.errors import UserError
from gtalign_jax.files import paths

_BATCH = 256  # rows of a parquet file in memory at a time


Rows = Callable[[str, str, Collection[str]], Iterator[Row]]


def jsonl_rows(place: str, split: str, tasks: Collection[str] = ()) -> Iterator[Row]:
    """Lines of JSON-lines files; `.json` files hold a list, or an object whose `data` is one."""
    del tasks
    for path, whole, task in _files(place, split, (".jsonl", ".json")):
        if path.suffix == ".json":
            for i, record in enumerate(_listed(path)):
                yield Row(f"{path}, row {i}", record, whole, task)
        else:
            for number, record in jsonl.stream(path):
                yield Row(f"{path}:{number}", record, whole, task)


def parquet_rows(place: str, split: str, tasks: Collection[str] = ()) -> Iterator[Row]:
    """Rows of parquet files, in flat memory."""
    del tasks
    for path, whole, task in _files(place, split, (".parquet",)):
        for i, record in enumerate(parquet_records(path)):
            yield Row(f"{path}, row {i}", record, whole, task)


def parquet_records(path: pathlib.Path, columns: Sequence[str] = ()) -> Iterator[Record]:
    """The rows of a parquet file, of these columns where it has them (none: all); UserError names what cannot
    be read."""
    first = 0
    try:
        with path.open("rb") as source, pq.ParquetFile(source) as file:
            kept = [name for name in columns if name in file.schema_arrow.names] or None
            for batch in file.iter_batches(_BATCH, columns=kept):
                yield from _decoded(batch, path, first)
                first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


def _decoded(batch: pa.RecordBatch, path: pathlib.Path, first: int) -> list[Record]:
    """The rows of a batch, whose first one is row `first` of its file."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for i, name in itertools.product(range(batch.num_rows), batch.schema.names):
            try:
                batch.column(name)[i].as_py()
            except UnicodeDecodeError as error:
                where = f"{path}, row {first + i}: {name}"
                raise UserError(
                    f"{where}: not UTF-8 (byte {error.start}); write the text as UTF-8"
                ) from error
        raise


def hub_rows(place: str, split: str, tasks: Collection[str] = ()) -> Iterator[Row]:
    """Rows of a data set of the hub, or of a local folder of one, streamed: it need not fit in memory."""
    import datasets

    del tasks
    name, _, subset = place.partition(":")
    try:
        if any((paths.path(name) / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(name)
            rows = saved[split] if isinstance(saved, dict) else saved
        else:
            rows = datasets.load_dataset(name, subset or None, split=split, streaming=True)
        for i, record in enumerate(rows):
            yield Row(f"hub:{place} {split}, row {i}", record)
    except StopIteration as error:  # of a file without a row
        raise UserError(f"config.data.source=hub:{place}: no item in split {split!r}") from error
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"config.data.source=hub:{place}: split {split!r} cannot be read ({reason})"
        ) from error


def tfds_rows(place: str, split: str, tasks: Collection[str]) -> Iterator[Row]:
    """Rows of TFDS data sets in ArrayRecord files, one task after the other."""
    from gtalign_jax.data.builders import opened

    yield from opened.rows_in_order(place, split, tasks)


# What comes before the colon of config.data.source → (what comes after it, how its rows are read).
KINDS: dict[str, tuple[str, Rows]] = {
    "jsonl": ("PATH", jsonl_rows),
    "parquet": ("PATH", parquet_rows),
    "hub": ("NAME", hub_rows),
    "tfds": ("NAME[:FOLDER]", tfds_rows),
}


def _files(place: str, split: str, endings: tuple[str, ...]) -> list[tuple[pathlib.Path, bool, str]]:
    """(file, whether it holds both splits, the task its folder names) of each file of a split."""
    path = paths.path(place).expanduser()
    if path.is_file():
        return [(path, True, "")]
    if not path.is_dir():
        raise UserError(f"config.data.source: {path}: no such file or folder")
    found = [(path / f"{split}{end}", False, "") for end in endings]
    found += [(p, False, p.parent.name) for end in endings for p in sorted(path.glob(f"*/{split}{end}"))]
    kept = [one for one in found if one[0].is_file()]
    if not kept:
        wanted = " or ".join(f"{split}{end}" for end in endings)
        raise UserError(f"{path}: holds no {wanted}; add it, or name the split in config.data.splits")
    return kept


def _listed(path: pathlib.Path) -> list[Any]:
    """The records of a JSON file; UserError when it is not UTF-8, not JSON, or holds no list."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    records = value.get("data") if isinstance(value, dict) else value
    if not isinstance(records, list):
        raise UserError(f"{path}: must hold a list of records, or an object whose data is one")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{path}, row {i}: {shown(record)}: must be an object")
    return records
