"""The clients of the stores, as fsspec hands them out to us, to epath and with it to Orbax.

They remember no listing, for other processes and other libraries write there too, and they wait for a store
that is down: for `PATIENCE_S` at least, then it is an OSError.
"""

import functools
import importlib
import os
from typing import Any

import tenacity

from gtalign_jax.errors import UserError

# Scheme → the package that knows it and the extra that brings it.
STORES = {"gs": "gcsfs", "s3": "s3fs"}
PATIENCE_S = 120.0
# botocore waits for 2^n seconds or 20, times a random number, before try n: two minutes come to this many.
_S3_TRIES = 16
_OF_CLIENTS = ("gcsfs", "s3fs", "botocore", "aiobotocore", "aiohttp", "google", "requests", "fsspec")


@functools.cache
def register(scheme: str) -> None:
    """Make fsspec hand out the client of a store; UserError names the extra that is not installed."""
    package = STORES[scheme]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{scheme}:// needs {package}: pip install 'gtalign-jax[{scheme}]'") from error
    import fsspec

    # epath would take TensorFlow's file system where that is installed, which none of this holds for.
    os.environ.setdefault("EPATH_USE_TF", "false")
    if scheme == "gs":
        for name in ("gs", "gcs"):
            fsspec.register_implementation(name, _gcs_class(), clobber=True)
    else:
        fsspec.register_implementation("s3", _s3_class(), clobber=True)


def of(path: os.PathLike[str]) -> Any:
    """The fsspec file system of a path on a store: the one that epath uses."""
    import fsspec

    scheme = os.fspath(path).partition("://")[0]
    register(scheme)
    return fsspec.filesystem("gcs", finalize_on_close=True) if scheme == "gs" else fsspec.filesystem("s3")


def read(path: os.PathLike[str], begin: int, end: int) -> bytes:
    """The bytes [begin, end) of an object on a store."""
    return of(path).cat_file(os.fspath(path), begin, end) if begin < end else b""


def _gcs_class() -> type:
    import gcsfs
    from gcsfs import retry

    class PatientGCS(gcsfs.GCSFileSystem):
        """gcsfs gives up after half a minute, and then tries whole uploads anew."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"use_listings_cache": False} | kwargs)

        async def _request(self, *args: Any, **kwargs: Any) -> Any:
            tries = tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception(retry.is_retriable),
                stop=tenacity.stop_after_delay(PATIENCE_S),
                wait=tenacity.wait_random_exponential(max=20),
            )
            once = gcsfs.GCSFileSystem._request.__wrapped__  # without the tries of its own
            try:
                return await tries(once, self, *args, **kwargs)
            except tenacity.RetryError as error:
                last = error.last_attempt.exception()
                raise OSError(f"the store does not answer ({_status(last)})") from last
            except retry.HttpError as error:
                kind = PermissionError if error.code in (401, "401") else OSError
                raise kind(_status(error)) from error

    return PatientGCS


def _status(error: BaseException | None) -> str:
    """The status of an answer, or what went wrong on the way to one."""
    code = getattr(error, "code", None)
    return f"status {code}" if code else said(error)


def _s3_class() -> type:
    import s3fs

    class PatientS3(s3fs.S3FileSystem):
        """botocore gives up after a few seconds."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            retries = {"retries": {"mode": "standard", "max_attempts": _S3_TRIES}}
            settings = retries | (kwargs.pop("config_kwargs", None) or {})
            super().__init__(*args, **{"use_listings_cache": False, "config_kwargs": settings} | kwargs)

    return PatientS3


def is_fault(error: BaseException) -> bool:
    """Whether an error is a store's or its client's word."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _OF_CLIENTS


def reason(error: BaseException) -> str:
    """What an error of a store says, and the mend, in one line."""
    text = said(error)
    if isinstance(error, FileNotFoundError) or "NoSuchBucket" in text or "bucket does not exist" in text:
        return "there is no such bucket or object; make the bucket, or name another"
    refused = ("Forbidden", "Access Denied", "AccessDenied", "redentials")
    if isinstance(error, PermissionError) or any(word in text for word in refused):
        return f"not permitted ({text}); log in with an account that may read and write there"
    return f"{text}; run the same command again when the store answers, or name another place"


def said(error: BaseException | None) -> str:
    """What the system says about an error, else its first line, else its kind."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
