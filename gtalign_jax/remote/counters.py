"""Numbers that many threads add to, by name."""

import collections
import contextlib
import threading
from collections.abc import Iterator


class Counters:
    """Sums and peaks by name; every method may be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, float] = collections.defaultdict(float)
        self._peaks: dict[str, float] = {}
        self._now: collections.Counter[str] = collections.Counter()

    def add(self, name: str, amount: float = 1) -> None:
        """Add to a sum."""
        with self._lock:
            self._sums[name] += amount

    def peak(self, name: str, value: float) -> None:
        """Keep the largest value seen."""
        with self._lock:
            self._peaks[name] = max(self._peaks.get(name, value), value)

    @contextlib.contextmanager
    def at_once(self, name: str) -> Iterator[None]:
        """A peak of how many are within this context together."""
        with self._lock:
            self._now[name] += 1
            now = self._now[name]
        self.peak(name, now)
        try:
            yield
        finally:
            with self._lock:
                self._now[name] -= 1

    def numbers(self) -> dict[str, float]:
        """All sums, then all peaks, as plain numbers by name; a name that has not occurred is absent."""
        with self._lock:
            sums, peaks = sorted(self._sums.items()), sorted(self._peaks.items())
            return {name: float(value) for name, value in [*sums, *peaks]}
