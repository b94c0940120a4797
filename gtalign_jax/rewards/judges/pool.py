"""Many prompts in flight over several endpoints: each ends as one verdict, scored or missing with a reason.

Knows nothing of HTTP: an endpoint is an async function from a prompt to a `Reply` that raises
`AttemptFailed`. Failover, reading verdicts and counting are here; tries and time limits in `http_client`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Awaitable, Callable, Sequence

from gtalign_jax.remote.client import AttemptFailed, Counters, answer_all, attempts
from gtalign_jax.rewards.judges.base import Verdict
from gtalign_jax.rewards.judges.rubrics import Prompt
from gtalign_jax.rewards.judges.verdict import read_on_scale


@dataclasses.dataclass(frozen=True)
class Reply:
    """What an endpoint answered. cut_off: it ran into its token limit."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    cut_off: bool = False


# Asks an endpoint; raises AttemptFailed where there is no reply.
Ask = Callable[[Prompt], Awaitable[Reply]]
# Opens the endpoints inside the running event loop and closes them at the end.
Connect = Callable[[], contextlib.AbstractAsyncContextManager[Sequence[Ask]]]


class JudgeStats(Counters):
    """Sums and peaks of one judge over all its calls; every method may be used from any thread."""

    def __init__(self):
        super().__init__()
        self._peaks: dict[str, float] = {}
        self._in_flight = 0

    def peak(self, name: str, value: float) -> None:
        """Keep the largest value seen."""
        with self._lock:
            self._peaks[name] = max(self._peaks.get(name, value), value)

    @contextlib.contextmanager
    def flight(self):
        """One attempt on its way, from sending to the end of the answer."""
        with self._lock:
            self._in_flight += 1
            now = self._in_flight
        self.peak("max_in_flight", now)
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1

    def numbers(self) -> dict[str, float]:
        """All counters as plain numbers; the names are listed in docs/judges.md."""
        sums = super().numbers()
        with self._lock:
            return sums | {name: float(value) for name, value in sorted(self._peaks.items())}


class Endpoints:
    """Whose turn it is: round-robin over endpoints that neither fail in a row nor asked for a pause."""

    def __init__(
        self, count: int, skip_after: int, skip_s: float, clock: Callable[[], float] = time.monotonic
    ):
        self.count = count
        self._skip_after, self._skip_s, self._clock = skip_after, skip_s, clock
        self._lock = threading.Lock()
        self._next = 0
        self._failures = [0] * count
        self._skipped_until = [0.0] * count
        self._paused_until = [0.0] * count

    def pick(self, avoid: Sequence[int] = ()) -> tuple[int, float]:
        """(endpoint, seconds its pause still lasts). `avoid`: where the request failed, latest last.

        Never the latest while there is another; of the others, those that rest come last, and where the
        request failed least often comes first. When all rest, the one that is free first: a request is
        never refused here.
        """
        with self._lock:
            now = self._clock()
            order = [(self._next + i) % self.count for i in range(self.count)]
            free_at = lambda i: max(self._paused_until[i], self._skipped_until[i], now)
            latest = avoid[-1] if avoid and self.count > 1 else None
            rests = lambda i: free_at(i) > now
            tried = lambda i: 0 if rests(i) else avoid.count(i)
            best = min(order, key=lambda i: (i == latest, rests(i), tried(i), free_at(i)))
            self._next = (best + 1) % self.count
            return best, max(0.0, self._paused_until[best] - now)

    def worked(self, index: int) -> None:
        """The endpoint answered."""
        with self._lock:
            self._failures[index], self._skipped_until[index] = 0, 0.0

    def failed(self, index: int, failure: AttemptFailed) -> None:
        """The endpoint failed: after some failures in a row it is skipped for a while."""
        with self._lock:
            now = self._clock()
            self._paused_until[index] = max(self._paused_until[index], now + failure.pause_s)
            if failure.blame:
                self._failures[index] += 1
                if self._failures[index] >= self._skip_after:
                    self._skipped_until[index] = now + self._skip_s


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """Limits of a pool; the fields are those of `HttpJudgeConfig`."""

    concurrency: int
    tries: int
    call_timeout_s: float
    wait_s: float
    max_wait_s: float


# Called with the place and text of a prompt whose verdict was read.
Found = Callable[[int, str], None]


def judge_all(
    prompts: Sequence[Prompt],
    connect: Connect,
    endpoints: Endpoints,
    config: PoolConfig,
    stats: JudgeStats,
    found: Found,
) -> list[Verdict]:
    """One verdict a prompt, in order; returns within call_timeout_s and a moment."""

    async def judge(asks: Sequence[Ask], place: int) -> Verdict:
        verdict, text = await _judge_one(prompts[place], asks, endpoints, config, stats)
        if verdict.score is not None:
            found(place, text)
        return verdict

    late = Verdict(None, f"not judged within call_timeout_s={config.call_timeout_s:g}")
    limits = {"in_flight": config.concurrency, "seconds": config.call_timeout_s, "late": late}
    verdicts = answer_all(len(prompts), connect, judge, **limits)
    if left := sum(verdict is late for verdict in verdicts):
        stats.add("failed/call_timeout", left)
    return verdicts


async def _judge_one(
    prompt: Prompt, asks: Sequence[Ask], endpoints: Endpoints, config: PoolConfig, stats: JudgeStats
) -> tuple[Verdict, str]:
    """(verdict, the text it was read from) after at most `tries` attempts."""
    started = time.monotonic()
    tried: list[int] = []
    worth = ("again", "elsewhere") if endpoints.count > 1 else ("again",)
    tries = attempts(config.tries, config.wait_s, config.max_wait_s, lambda failure: failure.retry in worth)
    try:
        async for attempt in tries:
            with attempt:
                if attempt.retry_state.attempt_number > 1:
                    stats.add("retries")
                index, pause = endpoints.pick(avoid=tried)
                tried.append(index)
                await asyncio.sleep(min(pause, config.max_wait_s))
                score, text = await _attempt(prompt, asks[index], index, endpoints, stats)
    except AttemptFailed as failure:
        return Verdict(None, failure.reason, time.monotonic() - started), ""
    return Verdict(score, "", time.monotonic() - started), text


async def _attempt(
    prompt: Prompt, ask: Ask, index: int, endpoints: Endpoints, stats: JudgeStats
) -> tuple[float, str]:
    """(score, text) of one attempt; raises AttemptFailed, counted and reported to the endpoints."""
    stats.add("attempts")
    started = time.monotonic()
    try:
        with stats.flight():
            reply = await ask(prompt)
        endpoints.worked(index)
        stats.add("answers")
        stats.add("tokens_in", reply.tokens_in)
        stats.add("tokens_out", reply.tokens_out)
        stats.add("answer_s", time.monotonic() - started)
        stats.peak("max_answer_s", time.monotonic() - started)
        verdict = read_on_scale(reply.text, prompt.scale)
        if verdict.score is None:
            kind = "cut_off" if reply.cut_off else "no_verdict"
            reason = f"{verdict.reason} (it was cut off at max_tokens)" if reply.cut_off else verdict.reason
            raise AttemptFailed(kind, reason, blame=False)
    except AttemptFailed as failure:
        stats.add(f"failed/{failure.kind}")
        endpoints.failed(index, failure)
        raise
    return verdict.score, reply.text
