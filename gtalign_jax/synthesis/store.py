"""The records of a synthesis in its work directory: parts that appear whole, and the data set they make.

    config.json            what the records follow from
    parts/00000032.jsonl   the records from prompt 32 on, a batch a file
    train.jsonl            one line a prompt that has a chain, in the order of the data
    tfds/chains/TASK/      the same as TFDS data sets in ArrayRecord files, one a task
    report.json            what was kept and what was given up

A kill leaves whole parts; they are always the first ones, so their count says where to go on.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from gtalign_jax import jsonl
from gtalign_jax.config import to_json
from gtalign_jax.errors import UserError
from gtalign_jax.files import drafts
from gtalign_jax.remote.client import redacted_value
from gtalign_jax.run.changes import differences
from gtalign_jax.run.record import has_steps

PARTS, CONFIG, REPORT, TFDS, NAME = "parts", "config.json", "report.json", "tfds", "chains"
Fields = dict[str, Any]
# What the records follow from, but for how long whom is waited for, and what is paid.
_SECTIONS = ("data", "features", "judge", "reward", "synthesis")
_FREE = frozenset(
    "tries timeout_s call_timeout_s wait_s max_wait_s api_key_env endpoints in_flight concurrency patience_s "
    "skip_after skip_s cache_dir workers at_once price_in price_out".split()
)


def claim(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Record the config; UserError where the folder holds records of another one, or a training run."""
    path, fields = workdir / CONFIG, json.loads(to_json(config))
    if has_steps(workdir):
        raise UserError(f"{workdir}: holds a training run; name a new --workdir")
    if not any(workdir.glob(f"{PARTS}/*")):
        jsonl.write_atomic(path, to_json(config))
        return
    if not path.is_file():
        raise UserError(f"{workdir}: holds records without their {CONFIG}; name a new --workdir")
    recorded = jsonl.read_object(path)
    mine, theirs = ({name: each.get(name) for name in _SECTIONS} for each in (fields, recorded))
    for change in differences(theirs, mine):
        if change.field.rpartition(".")[2] not in _FREE:
            old, new = redacted_value(change.old), redacted_value(change.new)
            raise UserError(
                f"{path}: its records have another config.{change.field} ({old!r}, now {new!r}); name a new "
                f"--workdir or remove the folder {workdir}"
            )


def records(workdir: pathlib.Path) -> Iterator[Fields]:
    """The records so far, in order."""
    for path in sorted((workdir / PARTS).glob("*.jsonl")):
        yield from jsonl.read(path)


def write_part(workdir: pathlib.Path, first: int, lines: Sequence[Fields]) -> None:
    """Put down the records of the prompts from `first` on: all of them, or none when it is killed."""
    (workdir / PARTS).mkdir(exist_ok=True)
    jsonl.write(workdir / PARTS / f"{first:08d}.jsonl", lines)


def finish(workdir: pathlib.Path, split: str, report: Fields) -> pathlib.Path:
    """Write the data set in both forms, and the report; returns the path of the first."""
    path = workdir / f"{split}.jsonl"
    jsonl.write(path, (record for record in records(workdir) if "chain" in record))
    _write_tfds(path, workdir, split)
    jsonl.write_atomic(workdir / REPORT, json.dumps(jsonl.plain(report), indent=1) + "\n")
    return path


def _write_tfds(path: pathlib.Path, workdir: pathlib.Path, split: str) -> None:
    """The lines of a file as data sets; an older folder of them stays until all are written."""
    from gtalign_jax.data.builders.records import write_records  # TFDS takes a second to import

    tasks = dict.fromkeys(record["task"] for record in jsonl.read(path))
    with drafts.folder(workdir / TFDS) as draft:
        for task in tasks:
            mine = (record for record in jsonl.read(path) if record["task"] == task)
            write_records(draft.folder, NAME, task, {split: mine})
