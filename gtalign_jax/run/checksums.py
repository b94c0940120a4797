"""Checksums of a folder's files: written with a checkpoint, checked before anything of it is read.

CRC-32 finds every burst of up to 32 flipped bits, and runs at the speed of memory.
"""

import json
import pathlib
import zlib
from collections.abc import Iterable

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.files import clients, drafts

NAME = "checksums.json"
_CHUNK = 1 << 20


def file_sum(path: pathlib.Path) -> list[int]:
    """[bytes, CRC-32] of a file, read in flat memory."""
    size = crc = 0
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def folder_sums(folder: pathlib.Path, parts: Iterable[str] = (".",)) -> dict[str, list[int]]:
    """Path inside `folder` → [bytes, CRC-32] of every file under these parts of it, sorted."""
    files = sorted({path for part in parts for path in drafts.files_under(folder / part)})
    return {path.relative_to(folder).as_posix(): file_sum(path) for path in files}


def write_sums(folder: pathlib.Path) -> None:
    """Write `checksums.json` of all files in the subfolders of `folder` (its own files may still change)."""
    parts = [path.name for path in folder.iterdir() if path.is_dir()]
    jsonl.write_atomic(folder / NAME, json.dumps(folder_sums(folder, parts), indent=0) + "\n")


def read_sums(folder: pathlib.Path) -> dict[str, list[int]] | None:
    """What `write_sums` wrote; None where there is none, and UserError where it cannot be read."""
    path = folder / NAME
    return jsonl.read_object(path) if path.is_file() else None


def first_damage(folder: pathlib.Path, sums: dict[str, list[int]], part: int = 0, parts: int = 1) -> str:
    """What is wrong with the first file that is not as `sums` says, or "". Of `parts` shares of the files one
    is looked at, by number."""
    for name in sorted(sums)[part::parts]:
        path = folder / name
        try:
            found = file_sum(path)
        except OSError as error:
            return f"{name}: {clients.said(error)}"
        if found != sums[name]:
            return f"{name}: {'another length' if found[0] != sums[name][0] else 'another checksum'}"
    return ""


def damage(folder: pathlib.Path, part: int = 0, parts: int = 1) -> str | None:
    """`first_damage` of a folder that holds its checksums; None where it holds none."""
    try:
        sums = read_sums(folder)
    except UserError as error:
        return str(error)
    return None if sums is None else first_damage(folder, sums, part, parts)
