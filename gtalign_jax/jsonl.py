"""JSON-lines files: strict on the way out, replaced whole; on the way in a line at a time, each fault named.

read(path)     a run's own file: absent is empty, a torn last line (its writer was killed) is left out
stream(path)   a user's file: every line counts, in flat memory, with its number
"""

import contextlib
import json
import logging
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

from gtalign_jax.errors import UserError
from gtalign_jax.files import drafts

log = logging.getLogger(__name__)
Path = str | pathlib.Path


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
def draft(path: Path, keep: bool = False) -> Iterator[TextIO]:
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
    if not pathlib.Path(path).is_file():
        return []
    found = []
    with pathlib.Path(path).open("rb") as source:
        for number, line in _numbered(source):
            try:
                found.append(_parse(line.decode("utf-8", errors="replace"), f"{path}:{number}"))
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
        with pathlib.Path(path).open("rb") as source:
            for number, line in _numbered(source):
                found = True
                yield number, _parse(_text(line, f"{path}:{number}"), f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a JSON-lines file") from error
    if not found:
        raise UserError(f"{path}: holds no lines")


def read_object(path: Path) -> dict[str, Any]:
    """The one JSON object that a file is; UserError names the file that is none."""
    try:
        text = _text(pathlib.Path(path).read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return _parse(text, str(path))


def _numbered(source: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank; they end at "\\n" alone: completions may hold Unicode's other separators."""
    return ((number, line) for number, line in enumerate(source, 1) if line.strip())


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); mend or remove the line") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object; mend or remove the line")
    return value
