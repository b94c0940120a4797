"""JSON-lines files: strict on the way out, replaced whole; on the way in a line at a time, each fault named.

read(path)     a run's own file: absent is empty, a torn last line (its writer was killed) is left out
stream(path)   a user's file: every line counts, in flat memory, with its number
"""

import codecs
import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

from gtalign_jax.errors import UserError
from gtalign_jax.files import clients, drafts, paths
from gtalign_jax.files.paths import Path

log = logging.getLogger(__name__)
# Deeper lines cannot be written again: each level takes a few calls of the interpreter's thousand.
MAX_DEPTH = 100


class _Unusable(UserError):
    """A line that is whole JSON, so that no cut can be the reason, and still of no use."""


def plain(value: Any) -> Any:
    """`value` as strict JSON can hold it: array scalars become numbers, numbers not finite become None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def encode(fields: Mapping[str, Any]) -> str:
    """One line, without its line end."""
    return json.dumps(plain(fields), ensure_ascii=False, allow_nan=False)


@contextlib.contextmanager
def draft(path: Path, keep: bool = False) -> Iterator[IO[str]]:
    """A text file that takes the place of `path` when the block ends well; an error leaves `path` alone.

    As `drafts.file`, with its `keep`. A lone surrogate is written as its JSON escape.
    """
    with drafts.file(path, keep=keep, encoding="utf-8", errors="backslashreplace", newline="\n") as sink:
        yield sink


def write_atomic(path: Path, text: str) -> None:
    """Replace a file by `text`."""
    with draft(path) as sink:
        sink.write(text)


def write(path: Path, lines: Iterable[Mapping[str, Any]], keep: bool = False) -> None:
    """Replace a file by these objects, one a line.

    keep: lines reach the disk as they come, and those that were whole when an error or a kill came stay in
    the draft (`drafts.file`).
    """
    with draft(path, keep) as sink:
        for fields in lines:
            sink.write(encode(fields) + "\n")
            if keep:
                sink.flush()


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that this library wrote, [] when it is absent.

    A torn last line is left out with a warning; damage elsewhere is a UserError.
    """
    if not paths.path(path).is_file():
        return []
    found = []
    with paths.path(path).open("rb") as source:
        for number, line in _numbered(source):
            try:
                found.append(_parse(line.decode("utf-8", errors="replace"), f"{path}:{number}"))
            except _Unusable:
                raise
            except UserError:
                if line.endswith(b"\n") or source.read(1):
                    raise
                log.warning("%s: the last line is incomplete and is left out", path)
    return found


def stream(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank, in flat memory.

    UserError names the file and line that cannot be read, is not UTF-8 or is not a JSON object, and the
    file when it cannot be opened or holds no lines.
    """
    found = False
    try:
        with paths.path(path).open("rb") as source:
            for number, line in _numbered(source):
                found = True
                yield number, _parse(_text(line, f"{path}:{number}"), f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({clients.said(error)}); name a JSON-lines file") from error
    if not found:
        raise UserError(f"{path}: holds no lines")


def read_object(path: Path) -> dict[str, Any]:
    """The one JSON object that a file is; UserError names the file that is none."""
    try:
        text = _text(paths.path(path).read_bytes().removeprefix(codecs.BOM_UTF8), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({clients.said(error)})") from error
    return _parse(text, str(path), "mend the file")


def _numbered(source: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank; they end at "\\n" alone: completions may hold Unicode's other separators.

    A byte order mark before the first one is left out.
    """
    for number, line in enumerate(source, 1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            yield number, text


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error


def _parse(text: str, where: str, mend: str = "mend or remove the line") -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error}); {mend}") from error
    except ValueError as error:
        limit = sys.get_int_max_str_digits()
        raise _Unusable(f"{where}: an integer of over {limit} digits; write a number or a string") from error
    except RecursionError as error:
        raise _Unusable(f"{where}: nested too deep; nest at most {MAX_DEPTH} levels") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object; {mend}")
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _Unusable(f"{where}: nested {_depth(value)} deep; nest at most {MAX_DEPTH} levels")
    return value


def _depth(value: Any) -> int:
    """How many objects and lists stand inside one another."""
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        level = [part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer)]
    return depth
