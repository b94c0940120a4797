"""The one exception for bad input: a line that names the field or file and the mend.

A dataclass knows its fields and not where they stand: it raises `ValueError("lr=0: must be positive")`, and
whoever builds it says where with `naming` (`config.build` for a section, a command for its flags).
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any


class UserError(ValueError):
    """Bad input of the user. `experiments/` prints it as one line and exits with status 2."""


@contextlib.contextmanager
def naming(prefix: str) -> Iterator[None]:
    """Any other ValueError from inside as a UserError, `prefix` (`config.data.`, `--`) before its text."""
    try:
        yield
    except UserError:  # names its place already
        raise
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from error


def exit_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Turn a `UserError` raised by a script's main into one line on stderr and exit status 2, and Ctrl-C into
    130."""

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped by Ctrl-C", file=sys.stderr)
            sys.exit(130)

    return run
