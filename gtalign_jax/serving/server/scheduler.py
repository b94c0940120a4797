"""Who decodes next: a thread that owns the device, seats those who wait, and tells each its tokens.

    ticket = scheduler.submit(row, tell)      from any thread; `tell` is called in the scheduler's
    ticket = scheduler.follow(ticket, ...)    a row that goes on from what another has written, in its place
    scheduler.cancel(ticket)                  its place is free at the next look
    future = scheduler.compute(work)          something else on the device, between two looks
    scheduler.close()                         those who sit or wait are answered, nobody else

It knows rows of tokens: no text, no HTTP and no prices. First come, first served.
"""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from gtalign_jax.rollout import continuous
from gtalign_jax.rollout.continuous import Places, Row
from gtalign_jax.rollout.decode_state import DecodeState
from gtalign_jax.rollout.ring import Newest

LOG = logging.getLogger(__name__)
STOP, FOUND, LENGTH, FAILED = "stop", "found", "length", "failed"


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The next tokens of a row and their log-probabilities.

    likely: (token, log-probability) of the most likely ones beside each, of a row that asked for them.
    done: None while more follow; STOP after an end token, which is the last of `ids`, FOUND after a stop
    string of the places, LENGTH when the budget is used up, FAILED when the device gave up on it.
    """

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    done: str | None = None
    likely: tuple[tuple[tuple[int, float], ...], ...] = ()


Tell = Callable[[Tokens], None]
T = TypeVar("T")


@dataclasses.dataclass(eq=False)
class Ticket:
    """A row in the queue or in a place; told: how many of its tokens were.

    after: the row that it goes on from, of whose tokens, prompt and all, it has the first `kept`. found: it
    ended at a stop string, and keeps its place for a row that goes on from it until it is cancelled.
    """

    row: Row
    tell: Tell
    after: "Ticket | None" = None
    kept: int = 0
    told: int = 0
    found: bool = False
    cancelled: bool = False


@dataclasses.dataclass(frozen=True)
class Load:
    """How busy: rows that wait and that sit, tokens told since the start, times the device failed."""

    waiting: int
    seated: int
    tokens: int
    failures: int


class Closed(RuntimeError):
    """The scheduler takes no more rows."""


class Scheduler:
    """The state of the device and its thread; `submit`, `cancel`, `load` and `close` may come from any."""

    def __init__(self, places: Places) -> None:
        """Compiles everything, then starts the thread."""
        self._places = places
        self._changed = threading.Condition()
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._following: list[Ticket] = []
        self._asked: collections.deque[tuple[Callable[[], Any], Future[Any]]] = collections.deque()
        self._seated: list[Ticket | None] = [None] * places.count
        self._closing = self._ended = False
        self._tokens = self._failures = 0
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._state: DecodeState = continuous.warm_up(places)
        self._thread.start()

    def submit(self, row: Row, tell: Tell) -> Ticket:
        """Queue a row. UserError when no place holds it, Closed when it comes too late."""
        continuous.check_row(self._places, row)
        ticket = Ticket(row, tell)
        with self._changed:
            if self._closing:
                raise Closed("the server is shutting down")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def follow(self, after: Ticket, row: Row, tell: Tell, kept: int) -> Ticket:
        """A row whose prompt begins with the first `kept` tokens of another's prompt and what it was told.

        It takes the other's place, and what the device knows of those tokens is not computed again; it is the
        next to sit down where the other has no place any more. UserError when no place holds it, Closed when
        the thread has ended: until then it goes on though the scheduler is closing.
        """
        continuous.check_row(self._places, row)
        ticket = Ticket(row, tell, after, kept)
        with self._changed:
            if self._ended:
                raise Closed("the server is shutting down")
            self._following.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forget a row: it is told nothing more. One that is done already stays so."""
        with self._changed:
            ticket.cancelled = True
            for queue in (self._waiting, self._following):
                if ticket in queue:
                    queue.remove(ticket)
            self._changed.notify()  # its place may be waited for

    def compute(self, work: Callable[[], T]) -> Future[T]:
        """Have the thread do some work between two looks at the rows. Closed when it comes too late.

        Work whose future is cancelled in time is not done; what it raises is the future's alone.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._closing:
                raise Closed("the server is shutting down")
            self._asked.append((work, future))
            self._changed.notify()
        return future

    def load(self) -> Load:
        with self._changed:
            seated = sum(ticket is not None for ticket in self._seated)
            waiting = len(self._waiting) + len(self._following) + len(self._asked)
            return Load(waiting, seated, self._tokens, self._failures)

    @property
    def alive(self) -> bool:
        """Whether the device's thread runs."""
        return self._thread.is_alive()

    def close(self, timeout_s: float | None = None) -> None:
        """Answer all that were submitted, then end the thread; wait for it so long."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._wait():
                self._compute()
                if not self._busy():
                    continue
                try:
                    self._seat()
                    self._state, seen = continuous.advance(self._places, self._state)
                except Exception:  # whatever it is, those who sit must hear of it and the next are served
                    LOG.exception("the device failed; its rows are given up and it begins again")
                    self._begin_again()
                else:
                    self._deliver(seen)
        finally:
            self._give_up()

    def _wait(self) -> bool:
        """Until there is something to do; False when all is done and nothing more comes."""
        with self._changed:
            while True:
                self._seated = [None if t is None or t.cancelled else t for t in self._seated]
                if self._asked or self._busy():
                    return True
                if self._closing and not self._waiting and not any(self._seated):
                    return False
                self._changed.wait()

    def _busy(self) -> bool:
        """Whether a row is to be seated or decoded."""
        with self._changed:
            room = self._waiting and None in self._seated
            return bool(self._following or room or any(t and not t.found for t in self._seated))

    def _compute(self) -> None:
        """One piece of what was asked for beside the rows."""
        with self._changed:
            if not self._asked:
                return
            work, future = self._asked.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except Exception as error:  # whatever it is, it is said to who asked, and the rows go on
                future.set_exception(error)

    def _seat(self) -> None:
        """Those who go on from another in its place, then those who have waited longest in the free ones."""
        self._seat_followers()
        for place, held in enumerate(self._seated):
            if held is not None:
                continue
            with self._changed:
                if not self._waiting:
                    return
                ticket = self._seated[place] = self._waiting.popleft()
            self._state = continuous.seat(self._places, self._state, ticket.row, place)

    def _seat_followers(self) -> None:
        with self._changed:
            following, self._following = self._following, []
        for ticket in following:
            state, place = (
                None,
                next((i for i, held in enumerate(self._seated) if held is ticket.after), None),
            )
            if place is not None and ticket.after is not None:
                # The device has computed all that was told but the last.
                known = len(ticket.after.row.prompt) + ticket.after.told - 1
                kept = min(ticket.kept, known, len(ticket.row.prompt) - 1)
                state = continuous.reseat(self._places, self._state, ticket.row, place, kept)
            with self._changed:
                if state is None or place is None:
                    self._waiting.appendleft(ticket)
                else:
                    self._state, self._seated[place] = state, ticket

    def _deliver(self, seen: Newest) -> None:
        for place, ticket in enumerate(self._seated):
            if ticket is None or ticket.cancelled or ticket.found:
                continue
            tokens = _told(ticket, seen, place, self._places.engine.eos_ids)
            ticket.told += len(tokens.ids)
            with self._changed:
                self._tokens += len(tokens.ids)
                ticket.found = tokens.done == FOUND
                if tokens.done and not ticket.found:
                    self._seated[place] = None
            if tokens.ids or tokens.done:
                ticket.tell(tokens)

    def _begin_again(self) -> None:
        with self._changed:
            lost, self._seated = [t for t in self._seated if t], [None] * self._places.count
            self._failures += 1
        _tell_failed(lost)
        self._state = continuous.empty(self._places)

    def _give_up(self) -> None:
        """The thread ends: nobody may wait for it."""
        with self._changed:
            self._closing = self._ended = True
            lost = [*self._waiting, *self._following, *(t for t in self._seated if t)]
            asked = [future for _, future in self._asked]
            for queue in (self._waiting, self._following, self._asked):
                queue.clear()
        _tell_failed(lost)
        for future in asked:
            if future.set_running_or_notify_cancel():
                future.set_exception(Closed("the server is shutting down"))


def _tell_failed(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        if not ticket.cancelled:
            ticket.tell(Tokens((), (), FAILED))


def _told(ticket: Ticket, seen: Newest, place: int, ends: Sequence[int]) -> Tokens:
    """What the row in a place has written since it was last told."""
    length = int(seen.length[place])
    new = slice(ticket.told - int(seen.first[place]), length - int(seen.first[place]))
    ids, done = tuple(seen.tokens[place, new].tolist()), None
    if seen.finished[place]:
        done = STOP if ids and ids[-1] in ends else FOUND
    elif length >= ticket.row.max_new_tokens:
        done = LENGTH
    logps = np.asarray(seen.logp[place, new], float)
    likely: list[tuple[tuple[int, float], ...]] = []
    if ticket.row.top and seen.likely is not None:
        each = zip(
            seen.likely.tokens[place, new].tolist(), seen.likely.logp[place, new].tolist(), strict=True
        )
        likely = [tuple(zip(*pair, strict=True)) for pair in each]
    return Tokens(ids, tuple(logps.tolist()), done, tuple(likely))
