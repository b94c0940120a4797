"""Many JSON requests in flight over several servers: each ends as an answer, or as the reason for none.

Which server is asked next and counting are here; tries and time limits in `http_client`; what is asked and
how an answer is read in `rollout.backends`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import openai

from gtalign_jax.remote.client import AttemptFailed, Counters, answer_all, attempts, open_client, post


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


class Pool(Counters):
    """Servers by root URL and how they fare; every method may be used from any thread.

    usable: indices of the servers that are asked; all of them until someone changes it. Counted: requests,
    attempts, retries, failed, failed/KIND, tokens, pushes.
    """

    def __init__(self, urls: Sequence[str], config: PoolConfig, api_key: str = "none"):
        super().__init__()
        self.urls, self.config, self.api_key = tuple(urls), config, api_key
        self.usable = frozenset(range(len(urls)))
        self._turns = threading.Lock()
        self._busy = [0] * len(urls)
        self._rests_until = [0.0] * len(urls)

    def take(self, tried: Sequence[int]) -> int:
        """The server for the next attempt: one not yet tried, not at rest, the least busy; counted busy."""
        with self._turns:
            now = time.monotonic()
            best = min(
                sorted(self.usable),
                key=lambda i: (tried.count(i), self._rests_until[i] > now, self._busy[i]),
            )
            self._busy[best] += 1
            return best

    def give_back(self, index: int, failure: AttemptFailed | None = None) -> None:
        """The attempt at a server is over; after a failure of its own it rests."""
        with self._turns:
            self._busy[index] -= 1
            if failure is not None and failure.blame:
                rest = max(self.config.rest_s, failure.pause_s)
                self._rests_until[index] = time.monotonic() + rest
            elif failure is None:
                self._rests_until[index] = 0.0


def post_all(pool: Pool, calls: Sequence[Call]) -> list[Any]:
    """What each call's `read` made, or `Failed`, in order; returns within call_timeout_s and a moment."""
    config = pool.config
    answers = answer_all(
        len(calls),
        lambda: _clients(pool),
        lambda clients, place: _answer(pool, clients, calls[place]),
        in_flight=config.in_flight,
        seconds=config.call_timeout_s,
        late=Failed("call_timeout", f"no answer within call_timeout_s={config.call_timeout_s:g}"),
    )
    pool.add("requests", len(calls))
    for answer in answers:
        if isinstance(answer, Failed):
            pool.add("failed")
            pool.add(f"failed/{answer.kind}")
    return answers


@contextlib.asynccontextmanager
async def _clients(pool: Pool) -> AsyncIterator[list[openai.AsyncOpenAI]]:
    """A client for each server."""
    config = pool.config
    async with contextlib.AsyncExitStack() as stack:
        opened = [open_client(url, pool.api_key, config.in_flight, config.timeout_s) for url in pool.urls]
        yield [await stack.enter_async_context(client) for client in opened]


async def _answer(pool: Pool, clients: Sequence[openai.AsyncOpenAI], call: Call) -> Any:
    """The answer after at most `tries` attempts, or `Failed`."""
    config, tried = pool.config, []
    # What one server refuses for good may still be served by another one.
    worth = lambda failure: failure.retry == "again" or not pool.usable <= set(tried)
    try:
        async for attempt in attempts(config.tries, config.wait_s, config.max_wait_s, worth):
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
        answer = call.read(await post(client, call.path, call.body, pool.config.timeout_s))
        failure = None
        return answer
    except AttemptFailed as error:
        failure = AttemptFailed(
            error.kind, f"{pool.urls[index]}: {error.reason}", error.retry, error.blame, error.pause_s
        )
        if error.pause_s:
            await asyncio.sleep(min(error.pause_s, pool.config.max_wait_s))
        raise failure from error
    finally:
        pool.give_back(index, failure)
