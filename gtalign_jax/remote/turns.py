"""Whose turn it is among several servers of the same kind."""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from gtalign_jax.remote.client import AttemptFailed


class Turn(NamedTuple):
    """Who is asked next, and for how many seconds it still wants to be left alone."""

    server: int
    pause_s: float


class Turns:
    """How the servers 0..count-1 fare; every method may be used from any thread.

    skip_after, skip_s: a server that failed so often in a row, by its own fault, rests so many seconds.
    least_busy: of equals the one with the fewest attempts under way comes first, not the next in the round.
    usable: the servers that may be asked; all of them until someone changes it.
    """

    def __init__(
        self,
        count: int,
        skip_after: int,
        skip_s: float,
        *,
        least_busy: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.usable = frozenset(range(count))
        self._count, self._skip_after, self._skip_s = count, skip_after, skip_s
        self._least_busy, self._clock = least_busy, clock
        self._lock = threading.Lock()
        self._next = 0
        self._busy, self._failures = [0] * count, [0] * count
        self._skipped_until, self._paused_until = [0.0] * count, [0.0] * count

    def take(self, tried: Sequence[int] = (), refused: Collection[int] = ()) -> Turn:
        """Who makes the next attempt; it is counted busy until that is given back.

        tried: where the request failed, latest last; refused: where it would fail again. Never the latest
        while there is another; of the others, those that refused it and those that rest come last, and where
        it failed least often comes first. When all rest, the one that is free first: a request is never
        refused here.
        """
        with self._lock:
            now = self._clock()
            latest = tried[-1] if tried and len(self.usable) > 1 else None

            def order(i: int) -> tuple[float, ...]:
                free_at = max(self._paused_until[i], self._skipped_until[i], now)
                rests = free_at > now
                failed = 0 if rests else tried.count(i)
                busy = self._busy[i] if self._least_busy else 0
                waited = (i - self._next) % self._count
                return (i == latest, i in refused, rests, failed, free_at, busy, waited)

            best = min(self.usable, key=order)
            self._next = (best + 1) % self._count
            self._busy[best] += 1
            return Turn(best, max(0.0, self._paused_until[best] - now))

    def give_back(self, server: int, failure: AttemptFailed | None = None) -> None:
        """The attempt at a server is over. failure: None when the server answered."""
        with self._lock:
            self._busy[server] -= 1
            if failure is None:
                self._failures[server], self._skipped_until[server] = 0, 0.0
                return
            now = self._clock()
            self._paused_until[server] = max(self._paused_until[server], now + failure.pause_s)
            if failure.blame:
                self._failures[server] += 1
                if self._failures[server] >= self._skip_after:
                    self._skipped_until[server] = now + self._skip_s
