"""A clean stop on request: schedulers send SIGTERM before they take a machine away, people press Ctrl-C."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Yields a function that gives the signal that asked for a stop, 0 before; a second ends the process."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield lambda: asked[0] if asked else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ended_by_sigterm(word: str = "stopped by SIGTERM; run the same command to go on") -> Iterator[None]:
    """SIGTERM ends the process with status 143, at once but in order: locks are given back.

    Process 1 of a container would else not hear it. `stop_requests` inside comes first. word: what is said
    then, if anything.
    """

    def end(number: int, frame: Any) -> None:
        if word:
            print(word, file=sys.stderr)
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
