"""One run at a time in a work directory: a file that says who writes there.

`run.lock` holds process id, host and time. Its owner touches it while it lives, so that on a folder that
several hosts see, one that nobody has touched for `STALE_S` is known for a dead one's; on the owner's own
host the process itself is asked for.
"""

import contextlib
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator

import psutil

from gtalign_jax.errors import UserError
from gtalign_jax.mesh import processes

log = logging.getLogger(__name__)
NAME = "run.lock"
TOUCH_S = 60.0
STALE_S = 600.0


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Hold a work directory; UserError, on all processes of a run, when a living run holds it.

    Process 0 takes the lock for all of them.
    """
    path = workdir / NAME
    owner = processes.from_main(lambda: _take(path))
    if not processes.is_main():
        yield
        return
    done = threading.Event()
    keeper = threading.Thread(target=_keep, args=(path, done), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join()
        if _read(path) == owner:
            path.unlink(missing_ok=True)


def _take(path: pathlib.Path) -> str:
    """Write the lock, in place of a dead one's; returns its text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    process = psutil.Process()
    fields = {
        "pid": process.pid,
        "host": socket.gethostname(),
        "time": time.time(),
        "began": process.create_time(),
    }
    text = json.dumps(fields) + "\n"
    draft = path.with_name(f".{NAME}.{uuid.uuid4().hex}")
    draft.write_text(text)
    try:
        while True:
            try:
                os.link(draft, path)  # whole or not at all, and never over another
                return text
            except FileExistsError:
                _remove_stale(path)
            except OSError:  # a file system without links
                with contextlib.suppress(FileExistsError), path.open("x") as sink:
                    sink.write(text)
                    return text
                _remove_stale(path)
    finally:
        draft.unlink()


def _remove_stale(path: pathlib.Path) -> None:
    """Remove a lock whose owner is dead, with a warning; UserError naming one that lives."""
    text = _read(path)
    if text is None:
        return  # given back meanwhile
    try:
        owner = json.loads(text)
        pid, host, began = int(owner["pid"]), str(owner["host"]), float(owner["began"])
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(owner["time"])))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a lock of a run; remove it if no run writes there") from None
    if _lives(path, pid, host, began):
        raise UserError(
            f"{path}: process {pid} on {host} writes there since {since}; wait, or name a new --workdir"
        )
    aside = path.with_name(f".{NAME}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):  # another took it over first
        os.rename(path, aside)
        if _read(aside) != text:  # the lock of one that was quicker: it goes back
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        else:
            log.warning("%s: process %d on %s is gone; taking over", path, pid, host)
        aside.unlink()


def _lives(path: pathlib.Path, pid: int, host: str, began: float) -> bool:
    """Whether the owner of a lock is alive, as far as this host can tell."""
    if host == socket.gethostname():
        try:
            # A number is given again; the moment it began tells one process from another.
            return abs(psutil.Process(pid).create_time() - began) < 2.0
        except psutil.NoSuchProcess:
            return False
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime < STALE_S
    return False


def _read(path: pathlib.Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _keep(path: pathlib.Path, done: threading.Event) -> None:
    """Touch the lock until it is given back."""
    while not done.wait(TOUCH_S):
        with contextlib.suppress(OSError):
            os.utime(path)
