"""Many JSON requests in flight over several servers: each ends as an answer, or as the reason for none.

Tries, time limits and counting are here; which server is asked next in `remote.turns`. What is asked and how
an answer is read is for the callers to say.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
import math
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import openai
import tenacity

from gtalign_jax.remote.client import NO_KEY, AttemptFailed, open_client, post, redacted
from gtalign_jax.remote.counters import Counters
from gtalign_jax.remote.turns import Turn, Turns

log = logging.getLogger(__name__)

# A client looks through all its connections at every request: several small ones are faster than one big.
_CONNECTIONS = 16
_REASON_CHARS = 300
_AWAY = ("connection", "http_502", "http_503", "http_504")  # kinds of failure while a server starts again
LATE = "call_timeout"  # the kind of what was not answered within call_timeout_s


class Line(NamedTuple):
    """To one server: its clients in endless rounds, and whose holder alone welcomes it back."""

    clients: Iterator[openai.AsyncOpenAI]
    gate: asyncio.Lock


Lines = Sequence[Line]


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """in_flight: requests at a time. tries: attempts of a request. timeout_s: of one attempt; call_timeout_s:
    of a whole call of `post_all`. wait_s, max_wait_s: random exponential wait between attempts, and the
    longest Retry-After obeyed. patience_s: so long a request is tried on, beyond its tries, while servers are
    away (no connection, 502, 503 or 504).
    """

    in_flight: int = 256
    tries: int = 3
    timeout_s: float = 600.0
    call_timeout_s: float = 3600.0
    wait_s: float = 0.5
    max_wait_s: float = 20.0
    patience_s: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """Servers by URL and what is known of them; calls from several threads may share it.

    counters: attempts and retries are counted here. watch: entered for every attempt, from sending to the
    end of reading; the attempt's AttemptFailed passes through it. second_opinion: what one server refuses
    for good is put to the others too. away: places of servers that were not there when last asked; missed:
    those of them that a warning said so of. welcome: place → what such a one is asked first when it is back,
    for it may have forgotten (None: nothing). trust: made once for all connections.
    """

    urls: tuple[str, ...]
    config: PoolConfig
    turns: Turns
    counters: Counters
    api_key: str = NO_KEY
    watch: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    second_opinion: bool = False
    welcome: Callable[[int], "Call | None"] = lambda place: None
    away: set[int] = dataclasses.field(default_factory=set)
    missed: set[int] = dataclasses.field(default_factory=set)
    trust: ssl.SSLContext = dataclasses.field(default_factory=ssl.create_default_context)

    def numbers(self) -> dict[str, float]:
        """What was counted so far, as plain numbers by name."""
        return self.counters.numbers()


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a server sent. seconds: of this attempt; call_seconds: since the first attempt of the call."""

    json: Any
    seconds: float
    call_seconds: float


@dataclasses.dataclass(frozen=True)
class Call:
    """A POST of `body` to `path`; `read` makes the result of its answer, or raises AttemptFailed."""

    path: str
    body: Mapping[str, Any]
    read: Callable[[Answer], Any]


@dataclasses.dataclass(frozen=True)
class Failed:
    """A call without a result: kind, reason and server of its last attempt, and the seconds of them all.

    retry: as in `AttemptFailed`; `again` where any of its attempts failed so.
    """

    kind: str
    reason: str
    url: str = ""
    seconds: float = 0.0
    retry: str = "again"

    def __str__(self) -> str:
        return f"{self.url}: {self.reason}" if self.url else self.reason


def post_all(pool: Pool, calls: Sequence[Call]) -> list[Any]:
    """What each call's `read` made, or `Failed`, in order; returns within call_timeout_s and a moment.

    The event loop is its own, in this thread or, where this thread already runs one, in another. An exception
    of `read` other than AttemptFailed ends all.
    """
    if not calls:
        return []
    config = pool.config
    late = Failed(LATE, f"no answer within call_timeout_s={config.call_timeout_s:g}")
    results: list[Any] = [late] * len(calls)

    async def work(lines: Lines, places: Iterator[int]) -> None:
        for place in places:
            results[place] = await _result(pool, lines, calls[place])

    async def run() -> None:
        places = iter(range(len(calls)))  # shared: each worker takes the next one
        workers = min(config.in_flight, len(calls))
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(config.call_timeout_s),
                _open(pool, workers) as lines,
                asyncio.TaskGroup() as group,
            ):
                for _ in range(workers):
                    group.create_task(work(lines, places))

    _run_apart(run)
    return results


@contextlib.asynccontextmanager
async def _open(pool: Pool, workers: int) -> AsyncIterator[Lines]:
    """Clients of every server for so many requests at a time, closed at the end."""
    config, each = pool.config, range(math.ceil(workers / _CONNECTIONS))
    async with contextlib.AsyncExitStack() as stack:
        lines = []
        for url in pool.urls:
            opened = [
                open_client(url, pool.api_key, config.in_flight, config.timeout_s, pool.trust) for _ in each
            ]
            clients = itertools.cycle([await stack.enter_async_context(one) for one in opened])
            lines.append(Line(clients, asyncio.Lock()))
        yield lines


def _run_apart(run: Callable[[], Any]) -> None:
    """asyncio.run, in a thread of its own where this one is inside an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(run())
        return
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="http") as thread:
        thread.submit(lambda: asyncio.run(run())).result()


async def _result(pool: Pool, lines: Lines, call: Call) -> Any:
    """The result after at most `tries` attempts, more while a server is away, or `Failed`."""
    config, started = pool.config, time.monotonic()
    tried: list[int] = []
    refused: set[int] = set()  # who would say the same again
    passing = False

    def worth(error: BaseException) -> bool:
        if not isinstance(error, AttemptFailed) or (error.retry == "never" and not pool.second_opinion):
            return False
        return error.retry == "again" or not pool.turns.usable <= refused

    def enough(state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        away = isinstance(error, AttemptFailed) and error.kind in _AWAY
        patient = away and time.monotonic() - started < config.patience_s
        if patient and state.attempt_number == config.tries:
            _say_away(pool, tried[-1], str(error))
        return state.attempt_number >= config.tries and not patient

    tries = tenacity.AsyncRetrying(
        stop=enough,
        wait=tenacity.wait_random_exponential(multiplier=config.wait_s, max=config.max_wait_s),
        retry=tenacity.retry_if_exception(worth),
        reraise=True,
    )
    try:
        async for attempt in tries:
            with attempt:
                if tried:
                    pool.counters.add("retries")
                turn = pool.turns.take(tried, refused)
                tried.append(turn.server)
                try:
                    return await _attempt(pool, lines[turn.server], turn, call, started)
                except AttemptFailed as failure:
                    if failure.retry != "again":
                        refused.add(turn.server)
                    passing |= failure.retry == "again"
                    raise
    except AttemptFailed as failure:
        reason = redacted(failure.reason, [pool.api_key])[:_REASON_CHARS]
        url, seconds = pool.urls[tried[-1]], time.monotonic() - started
        return Failed(failure.kind, reason, url, seconds, "again" if passing else failure.retry)


async def _attempt(pool: Pool, line: Line, turn: Turn, call: Call, started: float) -> Any:
    """The result of one attempt, its turn given back. started: when the call's first attempt was made."""
    failure: AttemptFailed | None = AttemptFailed("cancelled", "cancelled", blame=False)
    try:
        await asyncio.sleep(min(turn.pause_s, pool.config.max_wait_s))
        pool.counters.add("attempts")
        with pool.watch():
            if turn.server in pool.away:
                await _welcome(pool, line, turn.server)
            sent = time.monotonic()
            body = await post(next(line.clients), call.path, call.body, pool.config.timeout_s)
            _say_back(pool, turn.server)
            failure, now = None, time.monotonic()  # it works, unless it is to blame for what it sent
            return call.read(Answer(body, now - sent, now - started))
    except AttemptFailed as error:
        if error.kind in _AWAY:
            pool.away.add(turn.server)
        if failure is not None or error.blame:
            failure = error
        raise
    finally:
        pool.turns.give_back(turn.server, failure)


async def _welcome(pool: Pool, line: Line, server: int) -> None:
    """What a server that was away is asked before anything else, once; AttemptFailed as any attempt."""
    first = pool.welcome(server)
    async with line.gate:
        if first is not None and server in pool.away:
            body = await post(next(line.clients), first.path, first.body, pool.config.timeout_s)
            first.read(Answer(body, 0.0, 0.0))
        pool.away.discard(server)


def _say_away(pool: Pool, server: int, reason: str) -> None:
    """Once, when a request begins to wait for it beyond its tries."""
    if server not in pool.missed:
        pool.missed.add(server)
        reason = redacted(reason, [pool.api_key])[:_REASON_CHARS]
        limit = pool.config.patience_s
        log.warning("%s is away (%s); waiting for up to patience_s=%g", pool.urls[server], reason, limit)


def _say_back(pool: Pool, server: int) -> None:
    if server in pool.missed:
        pool.missed.discard(server)
        log.warning("%s is back", pool.urls[server])
