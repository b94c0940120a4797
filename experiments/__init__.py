"""Commands; each is run with python -m experiments.NAME."""

import logging
import sys
from types import TracebackType


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while a command is still importing is no fault to trace; Python ends it with status 130."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _quiet


def _first_line(record: logging.LogRecord) -> bool:
    """What Orbax logs of a save that failed is raised too, where it is waited for: no second traceback."""
    record.exc_info = None
    return True


logging.getLogger("absl").setLevel(logging.ERROR)
logging.getLogger("absl").addFilter(_first_line)
