"""JSON-lines files: strict on the way out, tolerant of a torn last line on the way in, replaced whole."""

from __future__ import annotations

import json
import logging
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from gtalign_jax.errors import UserError

log = logging.getLogger(__name__)


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


def write_atomic(path: pathlib.Path, text: str) -> None:
    """Replace a file by `text`: a reader, or a kill in between, meets the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.incomplete")
    # A lone surrogate has no UTF-8 form; its backslash form is the JSON escape of the same character.
    draft.write_bytes(text.encode("utf-8", errors="backslashreplace"))
    os.replace(draft, path)


def write(path: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by these objects, one a line."""
    write_atomic(path, "".join(encode(fields) + "\n" for fields in lines))


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a file, [] when it is absent.

    A torn last line (its writer was killed) is left out with a warning; damage elsewhere is a UserError.
    Lines end at "\\n" alone: completions may hold the other line separators of Unicode.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not JSON ({error}); remove the line") from error
            log.warning("%s: the last line is incomplete and is left out", path)
            continue
        if not isinstance(fields, dict):
            raise UserError(f"{path}:{number}: a line must be a JSON object; remove it")
        found.append(fields)
    return found
