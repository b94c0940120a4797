"""The one exception for bad input: a line that names the field or file and the mend."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input of the user. `experiments/` prints it as one line and exits with status 2."""


def exit_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Turn a `UserError` raised by a script's main into one line on stderr and exit status 2."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return run
