"""Outputs on a disk: written beside their place under a name nobody can guess, put into it when whole.

A draft is made with O_EXCL and O_NOFOLLOW, so nothing that lies there already is written to; nothing but what
was made here is removed. What `drafts` promises of each function holds here.
"""

import contextlib
import dataclasses
import errno
import fcntl
import glob
import logging
import os
import pathlib
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from gtalign_jax.errors import UserError
from gtalign_jax.files.paths import Path

log = logging.getLogger(__name__)
# What a disk answers that is full or gone.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOST = (*_NO_ROOM, errno.EIO, errno.EROFS)
# Names for what a process holds open: they are written through even where a plain file is behind them.
_OPEN_ALREADY = ("/dev/", "/proc/")
# How the name of a draft ends, and the file that says that a folder is one of ours.
_END, _MARK = ".incomplete", "draft-of-gtalign-jax"


@dataclasses.dataclass(frozen=True)
class Draft:
    """A folder to write in. pass_on: of a file's name when it is whole; it may leave the disk then."""

    folder: pathlib.Path
    pass_on: Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Grown:
    """A folder to append in. bring: put what was written where it belongs; close: the folder's end."""

    folder: pathlib.Path
    bring: Callable[[], None]
    close: Callable[[], None]


@contextlib.contextmanager
def file(path: Path, mode: str = "w", *, keep: bool = False, **text: Any) -> Iterator[IO]:
    """`drafts.file`."""
    shown, path = path, pathlib.Path(path).expanduser().absolute()
    with naming_faults(shown):
        if _goes_through(path):
            with _opened(shown, path, os.O_APPEND, mode, text) as sink:
                yield sink
            return
        target = pathlib.Path(os.path.realpath(path))
        draft, sink = _create(shown, target, mode, text)
        try:
            with sink:
                yield sink
            os.replace(draft, target)
        finally:
            if keep and draft.exists() and draft.stat().st_size:
                log.warning("%s is not whole; what there is of it is in %s", shown, draft)
            else:
                draft.unlink(missing_ok=True)


def check(path: Path, flag: str, *inputs: Path) -> pathlib.Path:
    """`drafts.check`."""
    target = pathlib.Path(path).expanduser().absolute()
    for source in inputs:
        if target.is_file() and pathlib.Path(source).is_file() and os.path.samefile(target, source):
            raise UserError(f"{flag}={path}: is the input {source}; name another file to write")
    if not _goes_through(target):
        real = pathlib.Path(os.path.realpath(target))
        draft, sink = _create(path, real, "wb", {})
        sink.close()
        draft.unlink()
    return target


@contextlib.contextmanager
def folder(path: Path, keeps: Iterable[str] = (), needed: int | None = None) -> Iterator[Draft]:
    """`drafts.folder`."""
    target = pathlib.Path(os.path.realpath(pathlib.Path(path).expanduser()))
    with naming_faults(path, needed):
        room = _make_room(path, target)
        draft, old = room / "new", room / "old"
        with (room / _MARK).open("x") as mark:
            _is_free(mark)
            try:
                draft.mkdir()  # of the usual mode; the folder around it is closed to others
                yield Draft(draft, lambda name: None)
                _exchange(draft, target, old, keeps)
            except BaseException:
                _remove(room, draft)
                raise
            _remove(room, old)


def _make_room(shown: Path, target: pathlib.Path) -> pathlib.Path:
    """A new folder beside the target, for its draft; what killed writers left there goes."""
    name = f".{target.name[:100]}."
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent, name)
        return pathlib.Path(tempfile.mkdtemp(prefix=name, suffix=_END, dir=target.parent))
    except OSError as error:
        raise UserError(f"{shown}: cannot write there ({error.strerror}); name another folder") from error


def _remove(room: pathlib.Path, part: pathlib.Path) -> None:
    """Remove where a folder was written; something else in it, such as an old folder not put back, stays."""
    shutil.rmtree(part, ignore_errors=True)
    with contextlib.suppress(OSError):
        (room / _MARK).unlink()
        room.rmdir()


def _sweep(parent: pathlib.Path, name: str) -> None:
    """Remove drafts that bear our mark and that nobody holds any more: their writer was killed."""
    for mark in parent.glob(f"{glob.escape(name)}*{_END}/{_MARK}"):
        with contextlib.suppress(OSError, UserError), _opened(mark, mark, os.O_NOFOLLOW, "w", {}) as file:
            if _is_free(file) and not mark.parent.is_symlink():
                _remove(mark.parent, mark.parent / "new")


def _is_free(mark: IO) -> bool:
    """Take the lock of a draft, which ends with its process; False where it cannot be had."""
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _exchange(draft: pathlib.Path, target: pathlib.Path, old: pathlib.Path, keeps: Iterable[str]) -> None:
    """Put the draft in the place of the target, which goes to `old`; it comes back when that fails."""
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(draft, target)
    except BaseException:
        if old.exists():
            os.replace(old, target)
        raise
    for name in keeps:
        if not os.path.lexists(target / name):
            os.replace(old / name, target / name)


@contextlib.contextmanager
def naming_faults(path: Path, needed: int | None = None) -> Iterator[None]:
    """`drafts.naming_faults`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _LOST:
            raise
        size = f"; it takes {needed:,} bytes" if needed else ""
        mend = "free some space or name another place" if error.errno in _NO_ROOM else "name another place"
        raise UserError(f"{path}: writing failed ({error.strerror}){size}; {mend}") from error


def _goes_through(path: pathlib.Path) -> bool:
    """Whether writing goes to what is there, and no file takes its place; UserError for what is neither."""
    try:
        kind = path.stat().st_mode
    except OSError:
        if os.path.islink(os.path.realpath(path)):
            raise UserError(f"{path}: is a link in a circle; name another file") from None
        return False  # not there yet, or not to be reached: making the draft says why
    if stat.S_ISDIR(kind):
        raise UserError(f"{path}: is a folder; name a file to write")
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        return True
    if not stat.S_ISREG(kind):
        raise UserError(f"{path}: is neither a file nor a pipe; name a file to write")
    return str(path).startswith(_OPEN_ALREADY)


def _create(shown: Path, target: pathlib.Path, mode: str, text: dict[str, Any]) -> tuple[pathlib.Path, IO]:
    """(path, file open for writing) of a new draft beside the target, with the mode of what it replaces."""
    draft = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}{_END}")
    sink = _opened(shown, draft, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, text)
    with contextlib.suppress(OSError):
        os.fchmod(sink.fileno(), target.stat().st_mode & 0o777)
    return draft, sink


def _opened(shown: Path, path: pathlib.Path, flags: int, mode: str, text: dict[str, Any]) -> IO:
    """`path` open for writing with these flags; UserError that names `shown` when it cannot be."""

    def opener(name: str, _: int) -> int:
        return os.open(name, os.O_WRONLY | flags, 0o666)

    try:
        if flags & os.O_CREAT:
            path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, mode, opener=opener, **text)
    except OSError as error:
        raise UserError(f"{shown}: cannot write there ({error.strerror}); name another file") from error


def make_folder(path: Path, flag: str) -> pathlib.Path:
    """`drafts.make_folder`."""
    folder = pathlib.Path(path).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--{flag}={path}: cannot write there ({error.strerror}); name another folder"
        ) from error
    return folder


def remove(path: pathlib.Path) -> None:
    """`drafts.remove`."""
    shutil.rmtree(path, ignore_errors=True)


def files_under(folder: pathlib.Path) -> list[pathlib.Path]:
    """`drafts.files_under`."""
    return [path for path in folder.rglob("*") if path.is_file()]


@contextlib.contextmanager
def staged(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """`drafts.staged`: the folder itself."""
    yield folder


def grown(folder: pathlib.Path) -> Grown:
    """`drafts.grown`: the folder itself."""
    return Grown(folder, lambda: None, lambda: None)


def create(path: pathlib.Path, text: str) -> bool:
    """`drafts.create`: by a hard link, or by O_EXCL on a file system without links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _aside(path)
    draft.write_text(text)
    try:
        os.link(draft, path)  # whole or not at all, and never over another
        return True
    except FileExistsError:
        return False
    except OSError:
        with contextlib.suppress(FileExistsError), path.open("x") as sink:
            sink.write(text)
            return True
        return False
    finally:
        draft.unlink()


def withdraw(path: pathlib.Path, text: str) -> bool:
    """`drafts.withdraw`: moved aside first, and back where it turns out to be another's."""
    aside = _aside(path)
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    ours = aside.read_text() == text
    if not ours:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
    return ours


def _aside(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(16)}")


def touch(path: pathlib.Path, text: str) -> None:
    """`drafts.touch`."""
    os.utime(path)


def age(path: pathlib.Path) -> float | None:
    """`drafts.age`."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
