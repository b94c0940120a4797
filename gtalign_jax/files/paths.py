"""Paths as users write them: on a disk, or on a store (`gs://bucket/…`, `s3://bucket/…`).

path("runs/a")           a `pathlib.Path`
path("gs://bucket/a")    an `etils.epath.Path`, which answers the same calls but those about links and `**`;
                         annotations say `pathlib.Path` for both

`pathlib.Path("gs://bucket/a")` would be a local folder named `gs:`. So a user's text becomes a
path here only.
"""

import os
import pathlib
import re
from typing import cast

from gtalign_jax.errors import UserError
from gtalign_jax.files import clients

Path = str | os.PathLike[str]
_ON_STORE = tuple(f"{scheme}://" for scheme in clients.STORES)
# What nobody means by a local path: a scheme that is no store's, or a store's without its slashes.
_MISWRITTEN = re.compile(r"[a-z][a-z0-9+.-]*:/|(gs|gcs|s3|s3a|s3n)(:|//)", re.IGNORECASE)


def path(text: Path) -> pathlib.Path:
    """The path that a text names; UserError for a misspelt scheme, or one whose client is not installed."""
    written = os.fspath(text)
    if written.startswith(_ON_STORE):
        scheme, _, rest = written.partition("://")
        if not rest.strip("/") or rest.startswith("/"):
            raise UserError(f"{written}: names no bucket; write {scheme}://BUCKET/FOLDER")
        clients.register(scheme)
        from etils import epath  # imported here: most commands meet no store

        return cast(pathlib.Path, epath.Path(written))
    if _MISWRITTEN.match(written):
        raise UserError(
            f"{written}: is neither on a disk nor on a store; write gs://BUCKET/…, s3://BUCKET/…, "
            "or ./… for a local path"
        )
    return pathlib.Path(text)


def absolute(text: Path) -> pathlib.Path:
    """`path`, absolute, with `~` as the home folder."""
    found = path(text)
    return found if on_store(found) else found.expanduser().absolute()


def on_store(text: Path) -> bool:
    """Whether a path is on a store."""
    return os.fspath(text).startswith(_ON_STORE)


def local(text: Path, where: str) -> pathlib.Path:
    """`path` of what must be on a disk; UserError names the field or flag `where`."""
    found = path(text)
    if on_store(found):
        raise UserError(f"{where}={text}: must be on a local disk, not on a store; name a local path")
    return found
