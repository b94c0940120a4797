"""The pool without HTTP: whose turn it is, on a clock we turn by hand, and what a bug does."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtalign_jax.remote.client import AttemptFailed
from gtalign_jax.rewards.judges.pool import Endpoints, JudgeStats, PoolConfig, Reply, judge_all
from gtalign_jax.rewards.judges.rubrics import Prompt
from gtalign_jax.rewards.judges.verdict import BINARY

DOWN = AttemptFailed("http_500", "http 500")


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def endpoints(count, skip_after=2, skip_s=10.0):
    clock = Clock()
    return Endpoints(count, skip_after, skip_s, clock), clock


def turns(pool, n):
    return [pool.pick()[0] for _ in range(n)]


def test_round_robin():
    pool, _ = endpoints(3)
    assert turns(pool, 7) == [0, 1, 2, 0, 1, 2, 0]


def test_failures_in_a_row_rest_an_endpoint_and_time_brings_it_back():
    pool, clock = endpoints(2)
    pool.failed(0, DOWN)
    assert turns(pool, 4) == [0, 1, 0, 1]  # one failure is not enough
    pool.failed(0, DOWN)
    assert turns(pool, 4) == [1, 1, 1, 1]
    clock.now += 10.1
    assert set(turns(pool, 2)) == {0, 1}
    pool.failed(0, DOWN)  # still failing: rests again at once
    assert turns(pool, 2) == [1, 1]
    pool.worked(0)
    assert set(turns(pool, 2)) == {0, 1}


def test_an_answer_between_failures_starts_the_count_anew():
    pool, _ = endpoints(2)
    for _ in range(5):
        pool.failed(0, DOWN)
        pool.worked(0)
    assert set(turns(pool, 2)) == {0, 1}


def test_a_pause_is_kept_only_where_there_is_no_other_endpoint():
    slow = AttemptFailed("http_429", "http 429", blame=False, pause_s=3.0)
    pool, clock = endpoints(2)
    pool.failed(0, slow)
    assert [pool.pick() for _ in range(3)] == [(1, 0.0)] * 3
    pool.failed(1, AttemptFailed("http_429", "http 429", blame=False, pause_s=1.0))
    assert pool.pick() == (1, 1.0)  # the one that is free first
    clock.now += 5
    assert set(turns(pool, 2)) == {0, 1}
    alone, _ = endpoints(1)
    alone.failed(0, slow)
    assert alone.pick(avoid=[0]) == (0, 3.0)


def test_a_retry_goes_elsewhere_if_there_is_an_elsewhere():
    pool, _ = endpoints(2)
    assert [pool.pick(avoid=[0])[0] for _ in range(3)] == [1, 1, 1]
    for _ in range(2):
        pool.failed(1, DOWN)
    assert pool.pick(avoid=[0])[0] == 1  # resting, but the other one has just failed this request


def test_a_request_visits_every_endpoint_before_it_returns_to_one():
    pool, _ = endpoints(3)
    pool.pick()  # another request has moved the turn on
    tried = []
    for _ in range(3):
        tried.append(pool.pick(avoid=tried)[0])
        pool.pick()
    assert sorted(tried) == [0, 1, 2]
    for _ in range(2):
        pool.failed(2, DOWN)
    assert pool.pick(avoid=[0, 1])[0] == 0  # the untried one rests: better an endpoint that answers


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["ok", "fail", "pause", "tick"])), max_size=60))
def test_some_endpoint_is_always_named_with_a_bounded_wait(events):
    pool, clock = endpoints(3)
    for index, event in events:
        if event == "tick":
            clock.now += 1.0
        elif event == "ok":
            pool.worked(index)
        else:
            pool.failed(index, AttemptFailed("x", "x", pause_s=4.0 if event == "pause" else 0.0))
        picked, wait = pool.pick(avoid=[index])
        assert picked in {0, 1, 2} - {index} and 0 <= wait <= 4.0


def run(ask, count=5, **changes):
    limits = dict(concurrency=2, tries=3, call_timeout_s=9.0, wait_s=0.0, max_wait_s=0.0)
    stats, found = JudgeStats(), []

    @contextlib.asynccontextmanager
    async def connect():
        yield [ask]

    prompts = [Prompt("", str(i), BINARY) for i in range(count)]
    keep = lambda place, text: found.append((place, text))
    config = PoolConfig(**(limits | changes))
    return judge_all(prompts, connect, endpoints(1)[0], config, stats, keep), stats.numbers(), found


def test_only_texts_with_a_verdict_are_reported_for_keeping():
    async def ask(prompt):
        return Reply(r"\boxed{1}" if int(prompt.user) % 2 else "hm", tokens_out=3)

    verdicts, numbers, found = run(ask, tries=1)
    assert [v.score for v in verdicts] == [None, 1, None, 1, None]
    assert sorted(found) == [(1, r"\boxed{1}"), (3, r"\boxed{1}")]
    assert numbers["tokens_out"] == 15 and numbers["failed/no_verdict"] == 3


def test_the_last_reason_stands_when_the_tries_are_used_up():
    calls = []

    async def ask(prompt):
        calls.append(prompt)
        raise AttemptFailed("x", f"reason {len(calls)}")

    verdicts, numbers, _ = run(ask, count=1)
    assert verdicts[0].reason == "reason 3"
    assert (numbers["attempts"], numbers["retries"], numbers["failed/x"]) == (3, 2, 3)


def test_a_bug_is_not_a_missing_verdict():
    async def ask(prompt):
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as error:
        run(ask)
    assert error.group_contains(ZeroDivisionError)
