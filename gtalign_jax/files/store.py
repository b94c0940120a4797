"""Outputs on a store: objects appear whole, so a file is written on the local disk first and put when done.

What `drafts` promises of each function holds here; the local disk needs room for one file at a time.
"""

import contextlib
import logging
import pathlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import IO, Any

from gtalign_jax.errors import UserError
from gtalign_jax.files import clients, paths
from gtalign_jax.files.local import Draft, Grown

log = logging.getLogger(__name__)
# Put last into a folder and taken first out of it: without it nobody takes the folder for a whole one.
_LAST = "config.json"
# A draft's folder that nothing was put into for so long was left by a writer that was killed.
_LEFT_S = 24 * 3600.0
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@contextlib.contextmanager
def file(path: pathlib.Path, mode: str = "w", *, keep: bool = False, **text: Any) -> Iterator[IO]:
    """`drafts.file`; what `keep` leaves is on the local disk."""
    with naming_faults(path):
        _free(path)
        room = pathlib.Path(tempfile.mkdtemp(prefix="gtalign-"))
        draft, whole = room / path.name, False
        try:
            with draft.open(mode.replace("x", "w"), **text) as sink:
                yield sink
            _put(draft, path)
            whole = True
        finally:
            if keep and not whole and draft.exists() and draft.stat().st_size:
                log.warning("%s is not whole; what there is of it is in %s", path, draft)
            else:
                shutil.rmtree(room, ignore_errors=True)


def check(path: pathlib.Path, flag: str, *inputs: paths.Path) -> pathlib.Path:
    """`drafts.check`: the bucket takes an object beside `path`."""
    for source in inputs:
        if paths.path(source) == path:
            raise UserError(f"{flag}={path}: is the input {source}; name another file to write")
    with naming_faults(path):
        _free(path)
        _probe(path.parent)
    return path


def make_folder(path: pathlib.Path, flag: str) -> pathlib.Path:
    """`drafts.make_folder`; folders are parts of names here, and there is nothing to make."""
    with naming_faults(f"--{flag}={path}"):
        if path.is_file():
            raise UserError(f"--{flag}={path}: is an object; name a folder")
        _probe(path)
    return path


def _probe(folder: pathlib.Path) -> None:
    """Put and remove an object, for only the bucket knows what is permitted."""
    path = folder / f".{secrets.token_hex(8)}.probe"
    clients.of(path).pipe_file(str(path), b"")
    path.unlink(missing_ok=True)


def _free(path: pathlib.Path) -> None:
    """UserError where a folder stands in a file's place."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file to write")


@contextlib.contextmanager
def folder(path: pathlib.Path, keeps: Iterable[str] = (), needed: int | None = None) -> Iterator[Draft]:
    """`drafts.folder`: files that were passed on wait beside `path` under a name of their own."""
    with naming_faults(path, needed), tempfile.TemporaryDirectory(prefix="gtalign-") as room:
        prefix = f".{path.name[:100]}."
        _sweep(path.parent, prefix)
        waiting = path.parent / f"{prefix}{secrets.token_hex(8)}.incomplete"
        here = pathlib.Path(room)

        def pass_on(name: str) -> None:
            _put(here / name, waiting / name)
            (here / name).unlink()

        try:
            yield Draft(here, pass_on)
            _exchange(here, waiting, path, set(keeps))
        finally:
            remove(waiting)


def _exchange(here: pathlib.Path, waiting: pathlib.Path, target: pathlib.Path, keeps: set[str]) -> None:
    """Fill the target with the files of both drafts; what it held goes, but what is to be kept."""
    (target / _LAST).unlink(missing_ok=True)
    held = {str(file.relative_to(target)) for file in files_under(target)}
    moved = {str(file.relative_to(waiting)) for file in files_under(waiting)}
    ours = {str(file.relative_to(here)) for file in here.rglob("*") if file.is_file()}
    for name in sorted(moved):
        clients.of(target).cp_file(str(waiting / name), str(target / name))
    for name in sorted(ours - {_LAST}):
        _put(here / name, target / name)
    for name in sorted(held - moved - ours):
        if name.partition("/")[0] not in keeps:
            (target / name).unlink(missing_ok=True)
    if _LAST in ours:
        _put(here / _LAST, target / _LAST)


def _sweep(parent: pathlib.Path, prefix: str) -> None:
    """Remove drafts that nobody has put anything into for long."""
    for draft in parent.glob(f"{prefix}*.incomplete"):
        if all((age(file) or 0.0) > _LEFT_S for file in files_under(draft)):
            remove(draft)


def _put(source: pathlib.Path, target: pathlib.Path) -> None:
    clients.of(target).put_file(str(source), str(target))


def remove(path: pathlib.Path) -> None:
    """`drafts.remove`."""
    client = clients.of(path)
    with contextlib.suppress(FileNotFoundError):
        for found in client.find(str(path)):
            client.rm_file(found)


def files_under(folder: pathlib.Path) -> list[pathlib.Path]:
    """`drafts.files_under`."""
    scheme = str(folder).partition("://")[0]
    return [paths.path(f"{scheme}://{found}") for found in clients.of(folder).find(str(folder))]


@contextlib.contextmanager
def staged(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """`drafts.staged`: a copy that lasts as long as the block."""
    with tempfile.TemporaryDirectory(prefix="gtalign-") as room:
        for file in files_under(folder):
            if file.suffix not in _WEIGHTS:
                here = pathlib.Path(room, file.relative_to(folder))
                here.parent.mkdir(parents=True, exist_ok=True)
                here.write_bytes(file.read_bytes())
        yield pathlib.Path(room)


def grown(folder: pathlib.Path) -> Grown:
    """`drafts.grown`: the files grow on the local disk and are put whole, those that have grown since."""
    room = tempfile.TemporaryDirectory(prefix="gtalign-")
    here, put = pathlib.Path(room.name), dict[pathlib.Path, int]()

    def bring() -> None:
        with naming_faults(folder):
            for file in sorted(here.rglob("*")):
                size = file.stat().st_size
                if file.is_file() and not file.is_symlink() and put.get(file) != size:
                    _put(file, folder / file.relative_to(here))
                    put[file] = size

    return Grown(here, bring, room.cleanup)


def create(path: pathlib.Path, text: str) -> bool:
    """`drafts.create`: the store refuses the second of two (`ifGenerationMatch`, `If-None-Match`).

    One that knows no conditions keeps the last, so what is there is read again.
    """
    with contextlib.suppress(FileExistsError):
        try:
            clients.of(path).pipe_file(str(path), text.encode(), mode="create")
        except OSError as error:
            if "condition" not in str(error).lower():
                raise
    return _text(path) == text  # an answer that was lost on its way was asked for again, and then refused


def withdraw(path: pathlib.Path, text: str) -> bool:
    """`drafts.withdraw`; between the look and the removal another could write, for a moment."""
    if _text(path) != text:
        return False
    path.unlink(missing_ok=True)
    return True


def touch(path: pathlib.Path, text: str) -> None:
    """`drafts.touch`: an object is as old as its last put."""
    if _text(path) == text:
        clients.of(path).pipe_file(str(path), text.encode())


def age(path: pathlib.Path) -> float | None:
    """`drafts.age`, by the store's clock and ours; a folder is as old as the newest in it."""
    times = [clients.of(path).modified(str(file)).timestamp() for file in files_under(path)]
    return time.time() - max(times) if times else None


def _text(path: pathlib.Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def naming_faults(path: paths.Path, needed: int | None = None) -> Iterator[None]:
    """`drafts.naming_faults`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not clients.is_fault(error):
            raise
        raise UserError(f"{path}: {clients.reason(error)}") from error
