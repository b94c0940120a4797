"""The one exception for bad input: a line that names the field or file and the mend.

A dataclass knows its fields and not where they stand: it raises `ValueError("lr=0: must be positive")`, and
whoever builds it says where with `naming` (`config.build` for a section, a command for its flags).
"""

import contextlib
import errno
import functools
import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


class UserError(ValueError):
    """Bad input of the user. `experiments/` prints it as one line and exits with status 2."""


INF = math.inf
MAX_COUNT = 2**31 - 1  # what a step counter or an array's axis holds
MAX_SEED = 2**63 - 1


def in_range(config: Any, **bounds: tuple[float, float]) -> None:
    """`within` for fields of a dataclass by name: in_range(self, alpha=(0, 1), steps=(0, MAX_COUNT))."""
    for name, (low, high) in bounds.items():
        within(config, low, high, name)


def within(config: Any, low: float, high: float, *names: str) -> None:
    """ValueError for a field of a dataclass (or a number in a tuple there) that is not in [low, high].

    Infinite ends do not belong to it: a number is finite. Fields whose default is whole are whole.
    """
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple | list) else (value,):
            numeric(config, name, number)
            if not low <= number <= high or number in (INF, -INF):
                raise ValueError(f"{name}={value}: must be {_span(low, high)}")


def numeric(config: Any, name: str, number: Any) -> None:
    """ValueError for what is no number of a field, or no whole one where the field's default is whole."""
    default = getattr(type(config), name, 0.0)
    whole = isinstance(default, int) and not isinstance(default, bool)
    if isinstance(number, bool) or not isinstance(number, int if whole else int | float):
        shown = getattr(config, name)
        raise ValueError(f"{name}={shown!r}: must be a {'whole ' if whole else ''}number")


def positive(config: Any, *names: str) -> None:
    """ValueError for a field of a dataclass that is not a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int | float) and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value}: must be positive{'' if value <= 0 else ' and finite'}")
        within(config, 0, INF, name)


def increasing(config: Any, *names: str) -> None:
    """ValueError for a field of a dataclass that is not a tuple of increasing positive whole numbers."""
    for name in names:
        sizes = getattr(config, name)
        whole = isinstance(sizes, tuple) and all(type(size) is int and size > 0 for size in sizes)
        if not whole or list(sizes) != sorted(set(sizes)):
            raise ValueError(f"{name}={sizes}: give positive sizes, increasing")


def _span(low: float, high: float) -> str:
    if high == INF:
        return "a finite number" if low == -INF else f"a finite number, {low:g} or more"
    if high in (MAX_COUNT, MAX_SEED):
        return f"from {low:g} to {high}"
    return f"from {low:g} to {high:g}"


@contextlib.contextmanager
def naming(prefix: str) -> Iterator[None]:
    """Any other ValueError from inside as a UserError, `prefix` (`config.data.`, `--`) before its text."""
    try:
        yield
    except UserError:  # names its place already
        raise
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from error


def _lost_output(error: OSError) -> str:
    """The line about a full disk or a store that fails, where nobody has named it before."""
    if error.errno is None:  # of a store's client: those have words and no number
        return f"{' '.join(str(error).split())}; see that the place can be reached, read and written"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise error
    _let_go_of_stdout()
    where = error.filename or "output"
    return f"{where}: writing failed ({error.strerror}); free some space or name another place"


def _let_go_of_stdout() -> None:
    """Where nothing can be written to stdout any more, have Python not try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def out_of_memory(error: BaseException) -> str | None:
    """What an error says of memory that a device or the host does not have; None: it speaks of another."""
    text = str(error)
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text:
        return None
    first = text.partition("RESOURCE_EXHAUSTED:")[2] or text
    return next(iter(first.strip().splitlines()), "no more is to be had")


def _no_memory(error: MemoryError | RuntimeError) -> str:
    """The line about memory, where nobody has said before what asked for it."""
    said = out_of_memory(error)
    if said is None:
        raise error
    return (
        f"out of memory ({said}); compute less at a time: shorter sequences, smaller batches, or in a run "
        "more algorithm.microbatches and sft.microbatches, fewer align.rollout_prompts, start.remat"
    )


def exit_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Turn a `UserError` raised by a script's main, a full disk or memory into one line on stderr and exit
    status 2, and Ctrl-C into 130.

    A pipe whose reader has gone (`| head`) is no fault: the status is 141, as of other commands, and nothing
    is printed. What a terminal or file cannot show (half a surrogate pair, any letter beyond ASCII in the C
    locale) is printed as its escape.
    """

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            main(*args, **kwargs)
            sys.stdout.flush()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except BrokenPipeError:
            _let_go_of_stdout()
            sys.exit(141)
        except OSError as error:
            print(f"error: {_lost_output(error)}", file=sys.stderr)
            sys.exit(2)
        except (MemoryError, RuntimeError) as error:
            print(f"error: {_no_memory(error)}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped by Ctrl-C", file=sys.stderr)
            sys.exit(130)

    return run
