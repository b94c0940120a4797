"""Outputs, put into their place whole or not at all: the one door to what disks and stores do otherwise.

file(path)       a file; through a symlink it is the file behind it, into a device or a pipe it goes straight
folder(path)     a folder, which takes the place of an older one of the same kind
check(path)      what a command does before its work: the place can be written and is none of its inputs
grown(folder)    a folder whose files are appended to
staged(folder)   a folder to be read by a library that reads disks alone
create(path)     a small file that only one of many writers makes

`local` and `store` hold what each of these does on a disk and on a store. On a store an object appears whole
or not at all, nothing is appended to, and no folder is renamed.
"""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import IO, Any

from gtalign_jax.files import local, paths, store
from gtalign_jax.files.local import Draft, Grown
from gtalign_jax.files.paths import Path

__all__ = ["Draft", "Grown"]


def _at(path: Path) -> ModuleType:
    """The half that knows this path's place."""
    return store if paths.on_store(path) else local


def file(path: Path, mode: str = "w", *, keep: bool = False, **text: Any) -> AbstractContextManager[IO]:
    """A file that takes the place of `path` when the block ends well; an error leaves `path` alone.

    A reader, or a kill in between, meets the old file or the new one. Where `path` is a device or a pipe,
    what is written goes straight through. keep: a draft that holds something is left after an error and
    named in a warning. `text`: as of `open`. UserError when the place cannot be written or the disk is full.
    """
    return _at(path).file(paths.path(path), mode, keep=keep, **text)


def check(path: Path, flag: str, *inputs: Path) -> pathlib.Path:
    """The absolute path of an output; UserError when it cannot be written or is one of the inputs."""
    return _at(path).check(paths.path(path), flag, *inputs)


def folder(path: Path, keeps: Iterable[str] = (), needed: int | None = None) -> AbstractContextManager[Draft]:
    """An empty folder that takes the place of `path`, links followed, when the block ends well.

    keeps: names in the old folder that go over into the new one, where that has none such; the rest of it is
    removed, so the caller has made sure that it may be. An error leaves the old folder. needed: the bytes it
    takes, for the line about a full disk. On a store `config.json` goes first and comes last: what is under
    way is no model.
    """
    return _at(path).folder(paths.path(path), keeps, needed)


def make_folder(path: Path, flag: str) -> pathlib.Path:
    """Make a folder and prove that it can be written; its absolute path. UserError names the flag."""
    return _at(path).make_folder(paths.path(path), flag)


def remove(path: pathlib.Path) -> None:
    """Remove a folder and all in it, as far as it is there."""
    _at(path).remove(path)


def files_under(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files in a folder and its subfolders."""
    return _at(folder).files_under(folder)


def grown(folder: pathlib.Path) -> Grown:
    """A folder on a disk whose files are appended to, and what brings them to `folder`."""
    return _at(folder).grown(folder)


def staged(folder: pathlib.Path) -> AbstractContextManager[pathlib.Path]:
    """A folder on a disk that holds the files of `folder`, those that weigh (tensors) left out."""
    return _at(folder).staged(folder)


def create(path: pathlib.Path, text: str) -> bool:
    """Make a file that holds `text`, whole; False where one is there already."""
    return _at(path).create(path, text)


def withdraw(path: pathlib.Path, text: str) -> bool:
    """Remove a file that holds `text`; False where it holds another by now, or is gone."""
    return _at(path).withdraw(path, text)


def touch(path: pathlib.Path, text: str) -> None:
    """Make a file that holds `text` as new as one that was just written."""
    _at(path).touch(path, text)


def age(path: pathlib.Path) -> float | None:
    """Seconds since a file was written or touched; None where there is none."""
    return _at(path).age(path)


def naming_faults(path: Path, needed: int | None = None) -> AbstractContextManager[None]:
    """A full or lost disk, or a store that fails, as a UserError that names the path and, where known, the
    bytes it takes."""
    return _at(path).naming_faults(path, needed)


@contextlib.contextmanager
def naming_store(path: Path) -> Iterator[None]:
    """`naming_faults` where the path is on a store, for a whole job: other libraries write there too."""
    with naming_faults(path) if paths.on_store(path) else contextlib.nullcontext():
        yield
