"""Who may ask, and how many at a time."""

import contextlib
import dataclasses
import hashlib
import hmac
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from gtalign_jax.errors import UserError
from gtalign_jax.files import paths
from gtalign_jax.serving.server.ask import ApiError, Bounds, Defaults
from gtalign_jax.serving.server.protocol import read_defaults

VARIABLE = "GTALIGN_API_KEYS"  # as the file, or keys divided by commas
RETRY_S = 1


@dataclasses.dataclass(frozen=True)
class Key:
    """One who may ask. digest: SHA-256 of the secret, which is kept nowhere. name: what logs call it."""

    name: str
    digest: bytes
    defaults: Defaults


@dataclasses.dataclass(frozen=True)
class Keys:
    """All who may ask; none: anybody may."""

    keys: tuple[Key, ...] = ()

    def find(self, header: str | None) -> Key:
        """The key of an Authorization header. ApiError 401 for none and for a wrong one.

        Every key is compared, each in constant time: how long it takes says nothing.
        """
        if not self.keys:
            return ANYBODY
        scheme, _, secret = (header or "").partition(" ")
        digest = _digest(secret.strip())
        matches = [key for key in self.keys if hmac.compare_digest(key.digest, digest)]
        if scheme.lower() != "bearer" or not matches:
            said = "Authorization: Bearer KEY is needed, with a key of this server"
            raise ApiError(401, said, code="invalid_api_key")
        return matches[0]


ANYBODY = Key("anybody", b"", Defaults())


def read_keys(path: str | None, bounds: Bounds) -> Keys:
    """The keys of a file or, without one, of the environment. UserError names the line at fault.

    A line is a key, or a JSON object with `key`, a `name`, and defaults: `pricing`, `analyze`, `reasoning`,
    `unusable`.
    """
    if path is None:
        where, lines = VARIABLE, os.environ.get(VARIABLE, "").split(",")
    else:
        where = path
        try:
            lines = paths.path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--keys={path}: cannot be read ({error}); name a file of keys") from error
    found: list[Key] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            found.append(_read_key(line.strip(), f"{where}:{number}", len(found) + 1, bounds))
    if path is not None and not found:
        raise UserError(f"--keys={path}: holds no key; write one a line")
    if len({key.digest for key in found}) < len(found):
        raise UserError(f"{where}: holds a key twice; keep one")
    return Keys(tuple(found))


def _read_key(line: str, where: str, number: int, bounds: Bounds) -> Key:
    entry: dict[str, Any] = {"key": line}
    if line.startswith("{"):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON; write a key, or an object with key") from error
    unknown = set(entry) - {"key", "name", *(field.name for field in dataclasses.fields(Defaults))}
    if unknown:
        raise UserError(f"{where}: {sorted(unknown)[0]}: no such field of a key")
    secret = entry.get("key")
    if not isinstance(secret, str) or not (
        secret.isascii() and secret.isprintable() and " " not in secret and secret
    ):
        raise UserError(f"{where}: key: must be printable ASCII without spaces")
    try:
        defaults = read_defaults(entry, bounds)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Key(str(entry.get("name", f"key {number}")), _digest(secret), defaults)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


@dataclasses.dataclass(frozen=True)
class Limits:
    """total, per_key: requests in work at a time. body_bytes: of a request. read_s: to send it. request_s: to
    answer it and have the answer read."""

    total: int = 256
    per_key: int = 128
    body_bytes: int = 1_000_000
    read_s: float = 20.0
    request_s: float = 600.0


class Admission:
    """Counts those in work; used in one thread."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._held = limits, Counter[bytes]()

    @property
    def total(self) -> int:
        return self._held.total()

    @contextlib.contextmanager
    def enter(self, key: Key) -> Iterator[None]:
        """One more in work. ApiError 429 when there are too many."""
        if self.total >= self._limits.total:
            raise ApiError(429, "the server has enough to do; come again", code="busy", retry_s=RETRY_S)
        if key is not ANYBODY and self._held[key.digest] >= self._limits.per_key:
            said = f"{self._limits.per_key} requests of this key are in work; wait for one"
            raise ApiError(429, said, code="too_many_requests", retry_s=RETRY_S)
        self._held[key.digest] += 1
        try:
            yield
        finally:
            self._held[key.digest] -= 1
