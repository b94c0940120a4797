"""What each step of a phase trains on: the order of rows, and how they become batches.

The order is a function of (seed, position) that is kept nowhere and depends on no host: data may be of any
size.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import grain
import numpy as np

T = TypeVar("T")
REFILL_STRIDE = 1_000_003  # steps between a batch and the batches that refill it: never met in a run


@dataclasses.dataclass(frozen=True)
class Order:
    """Rows epoch after epoch, each newly shuffled.

    counts: rows of each part of the data, which are numbered one part after the other. weights: of the parts;
    with them a part has this share of the positions, and epochs of its own. Without them all rows are one.
    """

    counts: tuple[int, ...]
    seed: int
    weights: tuple[float, ...] = ()

    def rows(self, start: int, stop: int) -> list[int]:
        """The row numbers at positions start to stop - 1."""
        return [self._rows[i] for i in range(start, stop)]

    @functools.cached_property
    def _rows(self) -> grain.MapDataset:
        if not self.weights:
            return grain.MapDataset.range(sum(self.counts)).seed(self.seed).shuffle()  # goes on past its end
        ends = np.cumsum(self.counts).tolist()
        parts = [
            grain.MapDataset.range(end - count, end).seed(self.seed + i).shuffle().repeat()
            for i, (count, end) in enumerate(zip(self.counts, ends, strict=True))
        ]
        return grain.MapDataset.mix(parts, self.weights)


@dataclasses.dataclass(frozen=True)
class Batching(Generic[T]):
    """How rows become the batches of steps. size: rows of one. width: the bucket that a row needs.

    window: the rows of so many steps are put in the order of their buckets before they are cut into batches,
    so that fewer are as wide as the widest row of all; 1 leaves them as they come.
    """

    size: int
    width: Callable[[T], int]
    seed: int
    window: int = 1

    @property
    def rows(self) -> int:
        """Rows of a window."""
        return self.size * self.window

    def batches(self, number: int, rows: Sequence[T]) -> list[list[T]]:
        """The batches of window `number`, in a shuffled order where they were sorted."""
        if self.window == 1:
            return [list(rows)]
        by_width = np.argsort([self.width(row) for row in rows], kind="stable").reshape(-1, self.size)
        order = np.random.default_rng([self.seed, 13, number]).permutation(self.window)
        return [[rows[i] for i in by_width[batch]] for batch in order]


class Feed(Protocol[T]):
    """The batches of a phase, asked for in the order of its steps.

    Step k + n · REFILL_STRIDE is the nth draw of rows in place of some of step k.
    """

    def batch(self, k: int) -> list[T]:
        """The rows of step k."""

    def steps_by_width(self, steps: Iterable[int]) -> dict[int, int]:
        """Width of a batch → the first of these steps whose batch has it, as far as it can be known. A batch
        is as wide as its widest row."""

    def state(self, k: int) -> Mapping[str, int]:
        """What a checkpoint before step k must hold of it."""

    def go_on(self, k: int, state: Mapping[str, int]) -> None:
        """Step k is next, as where the run had this state."""

    def close(self) -> None:
        """Nothing is asked any more."""


@dataclasses.dataclass(frozen=True)
class Rows(Feed[T]):
    """Rows in memory, in an order of their numbers: each batch is a function of (seed, k)."""

    rows: Sequence[T]
    order: Order
    batching: Batching[T]

    def batch(self, k: int) -> list[T]:
        window, place = divmod(k, self.batching.window)
        first = window * self.batching.rows
        rows = [self.rows[i] for i in self.order.rows(first, first + self.batching.rows)]
        return self.batching.batches(window, rows)[place]

    def steps_by_width(self, steps: Iterable[int]) -> dict[int, int]:
        found: dict[int, int] = {}
        widths = len(set(map(self.batching.width, self.rows)))
        for k in steps:
            found.setdefault(max(map(self.batching.width, self.batch(k))), k)
            if len(found) == widths:
                break
        return found

    def state(self, k: int) -> Mapping[str, int]:
        del k
        return {}

    def go_on(self, k: int, state: Mapping[str, int]) -> None:
        del k, state

    def close(self) -> None:
        pass
