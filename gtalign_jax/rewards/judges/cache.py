"""Judge answers on disk, keyed by prompt, model and sampling. A cache that fails is a miss, not an error."""

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from typing import Any

import diskcache

from gtalign_jax.errors import UserError
from gtalign_jax.rewards.judges.rubrics import Prompt

_FAILURES = (OSError, sqlite3.Error, diskcache.Timeout)
_KEPT_CHARS = 4000  # the end of a judge's answer, where its verdict stands


def prompt_key(prompt: Prompt, sampling: Mapping[str, Any]) -> str:
    """A hash of all that decides a judge's answer; sampling: model and sampling fields, JSON values."""
    parts = [prompt.system, prompt.user, dict(sampling)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class TextCache:
    """key → text in one folder; safe for several threads and processes.

    Raises UserError when the folder cannot be used. `errors` counts reads and writes that failed later.
    """

    def __init__(self, folder: str) -> None:
        self.errors = 0
        try:
            self._disk = diskcache.Cache(folder, timeout=5)
        except _FAILURES as error:
            where = f"config.judge.cache_dir={folder}"
            raise UserError(f"{where}: unusable ({error}); name another folder") from error

    def get(self, key: str) -> str | None:
        """The text stored under `key`, or None."""
        try:
            text = self._disk.get(key)
        except _FAILURES:
            self.errors += 1
            return None
        return text if isinstance(text, str) else None

    def put(self, key: str, text: str) -> None:
        """Store the end of `text` under `key`."""
        try:
            self._disk.set(key, text[-_KEPT_CHARS:].encode(errors="replace").decode())
        except _FAILURES:
            self.errors += 1
