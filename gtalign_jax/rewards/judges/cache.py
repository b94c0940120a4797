"""Answers of servers on disk, keyed by prompt, model and sampling. A cache that fails is a miss, no error."""

import contextlib
import hashlib
import json
import pathlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from gtalign_jax.errors import UserError
from gtalign_jax.files import paths
from gtalign_jax.rewards.judges.rubrics import Prompt

FILE = "verdicts.sqlite3"
_KEPT_CHARS = 4000  # the end of a judge's answer, where its verdict stands
_WAIT_S = 5.0  # for another process that writes
_LOOK_EVERY = 512  # entries written between two looks at the size
_COLUMNS = "n INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, text TEXT NOT NULL"


def prompt_key(prompt: Prompt, sampling: Mapping[str, Any]) -> str:
    """A hash of all that decides a judge's answer; sampling: model and sampling fields, JSON values."""
    parts = [prompt.system, prompt.user, dict(sampling)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _open(path: pathlib.Path) -> sqlite3.Connection:
    """The file at `path`, made where it is not there, waiting at most _WAIT_S for others that open it."""
    file = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
    file.execute("PRAGMA trusted_schema = OFF")  # a file's own views and triggers call nothing
    end = time.monotonic() + _WAIT_S
    while True:
        try:
            file.execute("PRAGMA journal_mode = WAL")  # readers wait for no writer
            break
        except sqlite3.OperationalError as error:  # the change of mode does not heed the connection's timeout
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)
    file.execute("PRAGMA synchronous = NORMAL")
    file.execute(f"CREATE TABLE IF NOT EXISTS verdict ({_COLUMNS})")
    file.execute("SELECT n, key, text FROM verdict LIMIT 1").fetchall()
    return file


class TextCache:
    """key → text in one SQLite file of a folder; safe for several threads and processes.

    What is read is text and nothing else: no entry, whoever wrote it, is more than that. limit: bytes, beyond
    which the oldest entries go. kept: characters at the end of a text that are stored. field: what named the
    folder. Raises UserError when the folder cannot be used. `errors` counts reads and writes that failed
    later.
    """

    def __init__(
        self, folder: str, limit: int = 2**30, kept: int = _KEPT_CHARS, field: str = "config.judge.cache_dir"
    ) -> None:
        self.errors = 0
        self._limit, self._kept, self._written, self._lock = limit, kept, 0, threading.Lock()
        path = paths.local(folder, field).expanduser() / FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open(path)
            self._shrink()  # writes, so that a folder that cannot be written is found now
        except (OSError, sqlite3.Error) as error:
            where = f"{field}={folder}"
            raise UserError(f"{where}: unusable ({error}); name another folder, or remove {FILE}") from error

    def get(self, key: str) -> str | None:
        """The text stored under `key`, or None."""
        with self._counting():
            row = self._file.execute("SELECT text FROM verdict WHERE key = ?", (key,)).fetchone()
            return row[0] if row and isinstance(row[0], str) else None
        return None

    def put(self, key: str, text: str) -> None:
        """Store the end of `text` under `key`."""
        kept = text[-self._kept :].encode(errors="replace").decode()
        with self._counting():
            self._file.execute("INSERT OR REPLACE INTO verdict (key, text) VALUES (?, ?)", (key, kept))
            self._written += 1
            if self._written % _LOOK_EVERY == 0:
                self._shrink()

    def _shrink(self) -> None:
        """Let the oldest tenth go while there is more than the limit."""
        pages, free, size = (
            self._file.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        used = (pages - free) * size
        tenth = "(SELECT MIN(n) + (MAX(n) - MIN(n)) / 10 FROM verdict)" if used > self._limit else "-1"
        self._file.execute(f"DELETE FROM verdict WHERE n <= {tenth}")

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """One use of the file at a time; a failure is counted and not raised."""
        with self._lock:
            try:
                yield
            except (OSError, sqlite3.Error):
                self.errors += 1
