"""Large JSON-lines files, one line at a time: every bad line is named, nothing half-written is left."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from gtalign_jax.errors import UserError

T = TypeVar("T")


def read(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank, in flat memory.

    UserError names the file and line that cannot be read, is not UTF-8 or is not a JSON object, and the
    file when it cannot be opened or holds no lines. Lines end at "\\n" alone.
    """
    found = False
    try:
        with pathlib.Path(path).open("rb") as source:
            for number, line in enumerate(source, 1):
                if line.strip():
                    found = True
                    yield number, _parse(line, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a JSON-lines file") from error
    if not found:
        raise UserError(f"{path}: holds no lines")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); mend or remove the line") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object; mend or remove the line")
    return value


@contextlib.contextmanager
def draft(path: str) -> Iterator[TextIO]:
    """A text file that takes the place of `path` when the block ends well; an error leaves `path` alone.

    A lone surrogate is written as its JSON escape. UserError when the folder cannot be written.
    """
    target = pathlib.Path(path).expanduser().absolute()
    made = target.with_name(f".{target.name}.incomplete")
    if target.is_dir():
        raise UserError(f"{path}: is a folder; name a file to write")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sink = made.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror}); name another file") from error
    try:
        with sink:
            yield sink
        os.replace(made, target)
    finally:
        made.unlink(missing_ok=True)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def counted(batch_list: Iterable[list[T]], name: str, line_seconds: float = 10.0) -> Iterator[list[T]]:
    """The same batches, with the lines done so far on stderr: a counter on a terminal, else plain lines."""
    done, last = 0, time.monotonic()
    with tqdm(desc=name, unit=" lines", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        for batch in batch_list:
            yield batch
            done += len(batch)
            bar.update(len(batch))
            if bar.disable and time.monotonic() - last >= line_seconds:
                last = time.monotonic()
                print(f"{name} {done} lines", file=sys.stderr, flush=True)
    print(f"{name}: {done} lines done", file=sys.stderr, flush=True)
