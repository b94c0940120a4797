"""Many JSON requests in flight over several servers: each ends as an answer, or as the reason for none.

Tries, waiting, failover, time limits and counting are here; what is asked and how an answer is read is in
`rollout.backends`.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import openai
import tenacity


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """in_flight: requests at a time. tries: attempts of a request. timeout_s: of one attempt; call_timeout_s:
    of a whole call of `post_all`. wait_s, max_wait_s: random exponential wait between attempts, and the
    longest Retry-After obeyed. rest_s: so long a server that failed is asked only when all others did too.
    """

    in_flight: int = 256
    tries: int = 3
    timeout_s: float = 600.0
    call_timeout_s: float = 3600.0
    wait_s: float = 0.5
    max_wait_s: float = 20.0
    rest_s: float = 15.0


class AttemptFailed(Exception):
    """One attempt gave no answer. kind: a short name to count by; again: whether another try may help;
    blame: whether the server, not the request, is at fault; pause_s: it asked to be left alone so long."""

    def __init__(self, kind: str, reason: str, again: bool = True, blame: bool = True, pause_s: float = 0.0):
        super().__init__(reason)
        self.kind, self.reason, self.again = kind, reason, again
        self.blame, self.pause_s = blame, pause_s


@dataclasses.dataclass(frozen=True)
class Call:
    """A POST of `body` to `path`; `read` makes the answer of its JSON, or raises AttemptFailed."""

    path: str
    body: Mapping[str, Any]
    read: Callable[[Any], Any] = lambda answer: answer


@dataclasses.dataclass(frozen=True)
class Failed:
    """A call without an answer, and why."""

    kind: str
    reason: str


class Pool:
    """Servers by root URL, how they fare, and counters; every method may be used from any thread.

    usable: indices of the servers that are asked; all of them until someone changes it.
    """

    def __init__(self, urls: Sequence[str], config: PoolConfig, api_key: str = "none"):
        self.urls, self.config, self.api_key = tuple(urls), config, api_key
        self.usable = frozenset(range(len(urls)))
        self._lock = threading.Lock()
        self._busy = [0] * len(urls)
        self._rests_until = [0.0] * len(urls)
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, name: str, amount: float = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name] += amount

    def numbers(self) -> dict[str, float]:
        """All counters: requests, attempts, retries, failed, failed/KIND, tokens."""
        with self._lock:
            return {name: float(value) for name, value in self._counts.items()}

    def take(self, tried: Sequence[int]) -> int:
        """The server for the next attempt: one not yet tried, not at rest, the least busy; counted busy."""
        with self._lock:
            now = time.monotonic()
            best = min(
                sorted(self.usable),
                key=lambda i: (tried.count(i), self._rests_until[i] > now, self._busy[i]),
            )
            self._busy[best] += 1
            return best

    def give_back(self, index: int, failure: AttemptFailed | None = None) -> None:
        """The attempt at a server is over; after a failure of its own it rests."""
        with self._lock:
            self._busy[index] -= 1
            if failure is not None and failure.blame:
                rest = max(self.config.rest_s, failure.pause_s)
                self._rests_until[index] = time.monotonic() + rest
            elif failure is None:
                self._rests_until[index] = 0.0


def post_all(pool: Pool, calls: Sequence[Call]) -> list[Any]:
    """What each call's `read` made, or `Failed`, in order; returns within call_timeout_s and a moment.

    Runs an event loop of its own, in this thread or, where this thread already runs one, in another.
    """
    if not calls:
        return []
    run = lambda: asyncio.run(_post_all(pool, calls))
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run()
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="engine") as thread:
        return thread.submit(run).result()


async def _post_all(pool: Pool, calls: Sequence[Call]) -> list[Any]:
    config = pool.config
    late = Failed("call_timeout", f"no answer within call_timeout_s={config.call_timeout_s:g}")
    answers: list[Any] = [late] * len(calls)
    places = iter(range(len(calls)))

    async def work(clients: Sequence[openai.AsyncOpenAI]) -> None:
        for place in places:
            answers[place] = await _answer(pool, clients, calls[place])

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(config.call_timeout_s), contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(_client(pool, url)) for url in pool.urls]
            async with asyncio.TaskGroup() as group:
                for _ in range(min(config.in_flight, len(calls))):
                    group.create_task(work(clients))
    pool.add("requests", len(calls))
    for answer in answers:
        if isinstance(answer, Failed):
            pool.add("failed")
            pool.add(f"failed/{answer.kind}")
    return answers


def _client(pool: Pool, url: str) -> openai.AsyncOpenAI:
    config = pool.config
    # The client's own type: which HTTP library it stands on differs between its versions.
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
        max_connections=config.in_flight, max_keepalive_connections=config.in_flight
    )
    timeout = openai.Timeout(config.timeout_s, connect=min(config.timeout_s, 30.0))
    http = openai.DefaultAsyncHttpxClient(limits=limits, timeout=timeout)
    return openai.AsyncOpenAI(api_key=pool.api_key, base_url=url, max_retries=0, http_client=http)


async def _answer(pool: Pool, clients: Sequence[openai.AsyncOpenAI], call: Call) -> Any:
    """The answer after at most `tries` attempts, or `Failed`."""
    config, tried = pool.config, []
    # A request that one server refuses for good may still be served by another one.
    worth = lambda e: isinstance(e, AttemptFailed) and (e.again or not pool.usable <= set(tried))
    tries = tenacity.AsyncRetrying(
        stop=tenacity.stop_after_attempt(config.tries),
        wait=tenacity.wait_random_exponential(multiplier=config.wait_s, max=config.max_wait_s),
        retry=tenacity.retry_if_exception(worth),
        reraise=True,
    )
    try:
        async for attempt in tries:
            with attempt:
                if tried:
                    pool.add("retries")
                index = pool.take(tried)
                tried.append(index)
                return await _attempt(pool, clients[index], index, call)
    except AttemptFailed as failure:
        return Failed(failure.kind, failure.reason)


async def _attempt(pool: Pool, client: openai.AsyncOpenAI, index: int, call: Call) -> Any:
    pool.add("attempts")
    failure: AttemptFailed | None = AttemptFailed("cancelled", "cancelled", blame=False)
    try:
        answer = call.read(await _post(client, call, pool.config.timeout_s))
        failure = None
        return answer
    except AttemptFailed as error:
        failure = AttemptFailed(
            error.kind, f"{pool.urls[index]}: {error.reason}", error.again, error.blame, error.pause_s
        )
        if error.pause_s:
            await asyncio.sleep(min(error.pause_s, pool.config.max_wait_s))
        raise failure from error
    finally:
        pool.give_back(index, failure)


async def _post(client: openai.AsyncOpenAI, call: Call, seconds: float) -> Any:
    """The JSON of the server's answer, None for an empty one; the whole attempt in `seconds`, however slowly
    the bytes drip."""
    try:
        async with asyncio.timeout(seconds):
            text = await client.post(call.path, cast_to=str, body=dict(call.body))
            return json.loads(text) if text else None
    except TimeoutError as error:
        raise AttemptFailed("timeout", f"timeout: no answer in {seconds:g} s") from error
    except openai.APIStatusError as error:
        raise _status_failure(error.response) from error
    except openai.APITimeoutError as error:
        raise AttemptFailed("timeout", "timeout: the server did not respond") from error
    except openai.OpenAIError as error:
        cause = type(error.__cause__ or error).__name__
        raise AttemptFailed("connection", f"connection failed ({cause})") from error
    except (ValueError, RecursionError) as error:
        raise AttemptFailed("bad_json", "the answer is not JSON") from error


def _status_failure(response: Any) -> AttemptFailed:
    """408, 409, 425, 429 and 5xx pass; any other status is the same at the next try."""
    status = response.status_code
    said = " ".join(response.text.split())[:160]
    kind, reason = f"http_{status}", f"http {status}" + (f": {said}" if said else "")
    if status in (408, 409, 425, 429) or status >= 500:
        try:
            pause = float(response.headers.get("retry-after", "0"))
        except ValueError:
            pause = 0.0
        return AttemptFailed(kind, reason, blame=status != 429, pause_s=pause if 0 < pause < 86400 else 0.0)
    return AttemptFailed(kind, reason, again=False, blame=status in (401, 403, 404, 405))
