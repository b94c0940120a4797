"""One run at a time in a work directory: a file that says who writes there.

`run.lock` holds process id, host and time. Its owner touches it while it lives, so that on a folder that
several hosts see, one that nobody has touched for `STALE_S` is known for a dead one's; on the owner's own
host the process itself is asked for.
"""

import contextlib
import json
import logging
import pathlib
import socket
import threading
import time
from collections.abc import Iterator

import psutil

from gtalign_jax.errors import UserError
from gtalign_jax.files import drafts
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
    keeper = threading.Thread(target=_keep, args=(path, owner, done), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join()
        if _read(path) == owner:
            drafts.withdraw(path, owner)


def _take(path: pathlib.Path) -> str:
    """Write the lock, in place of a dead one's; returns its text."""
    process = psutil.Process()
    fields = {
        "pid": process.pid,
        "host": socket.gethostname(),
        "time": time.time(),
        "began": process.create_time(),
    }
    text = json.dumps(fields) + "\n"
    while not drafts.create(path, text):
        _remove_stale(path)
    return text


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
    if drafts.withdraw(path, text):  # else another took it over first
        log.warning("%s: process %d on %s is gone; taking over", path, pid, host)


def _lives(path: pathlib.Path, pid: int, host: str, began: float) -> bool:
    """Whether the owner of a lock is alive, as far as this host can tell."""
    if host == socket.gethostname():
        try:
            # A number is given again; the moment it began tells one process from another.
            return abs(psutil.Process(pid).create_time() - began) < 2.0
        except psutil.NoSuchProcess:
            return False
    age = drafts.age(path)
    return age is not None and age < STALE_S


def _read(path: pathlib.Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _keep(path: pathlib.Path, owner: str, done: threading.Event) -> None:
    """Touch the lock until it is given back."""
    while not done.wait(TOUCH_S):
        with contextlib.suppress(OSError):
            drafts.touch(path, owner)
