"""Rows that need not fit in memory, read, tokenised and filtered while the steps before them are trained.

Rows come in the positions of an `Order`, a chunk at a time. Each host makes its share of a chunk, in worker
processes, ahead of need; then hosts exchange what they made, so all of them see the same rows whatever their
number. A row that nothing can be made of is left out and counted. So the rows of step k begin at a position
which depends on the data alone, is one number, and stands in the checkpoint of a run.
"""

import dataclasses
import itertools
import logging
import os
import pickle
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import grain
from absl import flags

from gtalign_jax.data.order import REFILL_STRIDE, Batching, Feed, Order
from gtalign_jax.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
CHUNK = 256  # positions that are made at a time
AHEAD = 8  # steps that are looked at for the buckets they need


@dataclasses.dataclass(frozen=True)
class Left:
    """A row that is left out. reason: what is wrong with it, the same words for all of a kind."""

    where: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Changed(Generic[T]):
    """A row that is used otherwise than it stands. how: what was done to it, the same words for all of a
    kind."""

    row: T
    where: str
    how: str


Made: TypeAlias = T | Left | Changed[T]
Make = Callable[[Sequence[int]], Sequence[Made[T]]]


def alone(make: Callable[[], Any]) -> list[Any]:
    """The exchange of one host."""
    return [make()]


@dataclasses.dataclass(frozen=True)
class Reading:
    """Who reads. host, hosts: this one's number, and how many there are. exchange: what each host makes, in
    their order, on every host. workers: processes of this host; 0 for a thread."""

    host: int = 0
    hosts: int = 1
    exchange: Callable[[Callable[[], Any]], list[Any]] = alone
    workers: int = 0


class Stream(Feed[T]):
    """The batches of steps, read in order; one that lies far behind is read again.

    make: rows by their numbers, each made, changed or left out; it is sent to the workers. UserError of it,
    of any host, ends all.
    """

    def __init__(self, make: Make[T], order: Order, batching: Batching[T], reading: Reading) -> None:
        self._make, self._order, self._batching, self._reading = make, order, batching, reading
        self._count = sum(order.counts)
        self._held: dict[int, list[list[T]]] = {}  # window → its batches
        self._starts = {0: 0}  # window → position of its first row
        self._told: Counter[str] = Counter()
        self._next, self._position = 0, 0
        self._chunks: Any = None
        self._rows: deque[Made[T]] = deque()

    def batch(self, k: int) -> list[T]:
        """As in `Feed`; rows that refill a step are the first that can be made from a place of their own."""
        if k >= REFILL_STRIDE:
            return self._refill(k % REFILL_STRIDE, k // REFILL_STRIDE)
        window, place = divmod(k, self._batching.window)
        self._read_to(window)
        oldest = window - AHEAD // self._batching.window  # a warm-up looks ahead, and training comes after it
        self._held = {w: batches for w, batches in self._held.items() if w >= oldest}
        self._starts = {w: start for w, start in self._starts.items() if w >= oldest}
        return self._held[window][place]

    def steps_by_width(self, steps: Iterable[int]) -> dict[int, int]:
        """As in `Feed`, of the first AHEAD steps alone: to look further would be to read all."""
        found: dict[int, int] = {}
        window = self._batching.window
        for k in itertools.islice((k for k in steps if k < REFILL_STRIDE), AHEAD):
            self._read_to(k // window)
            widths = map(self._batching.width, self._held[k // window][k % window])
            found.setdefault(max(widths), k)
        return found

    def state(self, k: int) -> dict[str, int]:
        """Where the rows of step k begin, for `go_on`."""
        window = k // self._batching.window
        if window not in self._starts and window < self._next:
            self._back_to(window)
        while window not in self._starts:
            self._read_window()
        return {"rows": self._count, "position": self._starts[window]}

    def go_on(self, k: int, state: Mapping[str, int]) -> None:
        """Step k is next, as a run that ended there had it; without a state it is found again from step 0."""
        if not state:
            return
        if state["rows"] != self._count:
            raise UserError(
                f"the training data has {self._count} rows and had {state['rows']} when the run began; give "
                "it the same data, or begin another run"
            )
        window = k // self._batching.window
        self._held, self._starts = {}, {window: state["position"]}
        self._begin(window)

    def close(self) -> None:
        """End the workers."""
        if self._chunks is not None:
            self._chunks.close()
        self._chunks = None

    def _begin(self, window: int) -> None:
        """Read on from the first row of a window."""
        self.close()
        self._rows.clear()
        self._next, self._position = window, self._starts[window]

    def _read_to(self, window: int) -> None:
        """Hold the batches of a window, and of those that were read on the way to it."""
        if window not in self._held and window < self._next:
            self._back_to(window)
        while window not in self._held:
            self._read_window()

    def _back_to(self, window: int) -> None:
        """Read again from the nearest window before this one, or this one, whose start is known."""
        self._starts = {0: 0} | {w: start for w, start in self._starts.items() if w <= window}
        self._begin(max(self._starts))

    def _read_window(self) -> None:
        """Read the window that follows."""
        first, rows = self._position, list[T]()
        while len(rows) < self._batching.rows:
            self._check_position(self._position - first, len(rows))
            row = self._read_row()
            if isinstance(row, Left):
                self._tell(row.where, f"{row.reason}, and is left out")
            elif isinstance(row, Changed):
                self._tell(row.where, row.how)
                rows.append(row.row)
            else:
                rows.append(row)
        self._held[self._next] = self._batching.batches(self._next, rows)
        self._next += 1
        self._starts[self._next] = self._position

    def _refill(self, k: int, number: int) -> list[T]:
        size, found = self._batching.size, list[T]()
        order = dataclasses.replace(self._order, seed=self._order.seed + number)
        share = _Share(self._make, order, self._reading.host, self._reading.hosts, size)
        numbers = itertools.count(k)
        for read in itertools.count(0, size):
            self._check_position(read, len(found))
            made = self._reading.exchange(lambda: share(next(numbers)).made())
            kept = [row for rows in made for row in rows if not isinstance(row, Left)]
            found += [row.row if isinstance(row, Changed) else row for row in kept]
            if len(found) >= size:
                break
        return found[:size]

    def _check_position(self, read: int, kept: int) -> None:
        """Refuse data of which a whole epoch does not fill a batch: it would be read for ever."""
        if read > self._count and kept < self._batching.size:
            raise UserError(
                f"of {self._count} training rows, {kept} can be used, and a step takes "
                f"{self._batching.size}; give more, or lower the prompts of a step"
            )

    def _read_row(self) -> Made[T]:
        """The row at the next position."""
        if not self._rows:
            if self._chunks is None:
                self._chunks = iter(self._pipeline(self._position // CHUNK))
            made = self._reading.exchange(lambda: self._next_chunk().made())
            self._rows.extend(row for rows in made for row in rows)
            for _ in range(self._position % CHUNK):
                self._rows.popleft()
        self._position += 1
        return self._rows.popleft()

    def _next_chunk(self) -> "_Chunk[T]":
        """This host's share of the next chunk."""
        chunk: Any = next(self._chunks)
        return pickle.loads(chunk) if self._reading.workers else chunk

    def _pipeline(self, first: int) -> grain.IterDataset:
        """Chunks from number `first` on, this host's share of each, made ahead of need."""
        reading = self._reading
        share = _Share(self._make, self._order, reading.host, reading.hosts, CHUNK)
        numbers = grain.MapDataset.range(first, 2**62 // CHUNK).map(share)
        if reading.workers:  # pickled at once: multiprocessing's own pickler is slower
            numbers = numbers.map(pickle.dumps)
        chunks = numbers.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        if not reading.workers:
            return chunks
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads its own, where no command has parsed any
        options = grain.MultiprocessingOptions(num_workers=reading.workers, per_worker_buffer_size=2)
        return chunks.mp_prefetch(options, worker_init_fn=_Worker(os.getpid()))

    def _tell(self, where: str, what: str) -> None:
        """Say of a kind of rows the first, the tenth, the hundredth, ..."""
        self._told[what] += 1
        count = self._told[what]
        if count == 10 ** (len(str(count)) - 1):
            log.warning("%s: %s (%d so far)", where, what, count)


@dataclasses.dataclass(frozen=True)
class _Chunk(Generic[T]):
    """What was made of a host's share of a chunk, or why it could not be; grain takes it for one thing."""

    rows: Sequence[Made[T]] = ()
    error: UserError | None = None

    def made(self) -> Sequence[Made[T]]:
        if self.error is not None:
            raise self.error
        return self.rows


@dataclasses.dataclass(frozen=True)
class _Share(Generic[T]):
    """Makes a host's share of `size` positions, contiguous as in `mesh.processes.part`."""

    make: Make[T]
    order: Order
    host: int
    hosts: int
    size: int

    def __call__(self, number: int) -> _Chunk[T]:
        start, stop = (self.size * host // self.hosts for host in (self.host, self.host + 1))
        numbers = self.order.rows(number * self.size + start, number * self.size + stop)
        try:
            return _Chunk(self.make(numbers) if numbers else [])
        except UserError as error:  # handed on as it is: grain would write into its message
            return _Chunk(error=error)


@dataclasses.dataclass(frozen=True)
class _Worker:
    """Has a worker process compute on one core, and end with the one that started it, also a killed one."""

    parent: int

    def __call__(self, index: int, count: int) -> None:
        del index, count
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # more workers are the way to more cores
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while os.getppid() == self.parent:
            time.sleep(1.0)
        os._exit(1)
