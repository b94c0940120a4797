"""The pool without HTTP: what is posted is answered by a function of (url, body), or fails."""

import asyncio
import collections
import contextlib
import dataclasses
import operator
import time

import pytest

from gtalign_jax.remote import pool as pool_lib
from gtalign_jax.remote.client import AttemptFailed
from gtalign_jax.remote.counters import Counters
from gtalign_jax.remote.pool import Answer, Call, Failed, Pool, PoolConfig, post_all
from gtalign_jax.remote.turns import Turns

A, B, C = URLS = ("http://a", "http://b", "http://c")


class Client:
    """Knows where it would send to, and counts itself when it is closed."""

    def __init__(self, url, closed):
        self.url, self.closed = url, closed

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        self.closed[self.url] += 1


class Network:
    """answer(url, body): the JSON, or a coroutine that makes it; it may raise. seen: URL by URL, in order."""

    def __init__(self, answer):
        self.answer, self.seen, self.closed = answer, [], collections.Counter()

    async def post(self, client, path, body, seconds):
        self.seen.append(client.url)
        result = self.answer(client.url, body)
        return await result if asyncio.iscoroutine(result) else result


@pytest.fixture
def serve(monkeypatch):
    def start(answer):
        network = Network(answer)
        monkeypatch.setattr(pool_lib, "open_client", lambda url, *settings: Client(url, network.closed))
        monkeypatch.setattr(pool_lib, "post", network.post)
        return network

    return start


class WatchedTurns(Turns):
    """Keeps what it was told of the attempts, by server."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.taken, self.told = [], []

    def take(self, *args):
        turn = super().take(*args)
        self.taken.append(turn.server)
        return turn

    def give_back(self, server, failure=None):
        self.told.append((server, failure and failure.kind))
        super().give_back(server, failure)


def make_pool(count=1, second_opinion=False, **changes):
    limits = dict(in_flight=2, tries=3, call_timeout_s=9.0, wait_s=0.0, max_wait_s=0.0)
    turns = WatchedTurns(count, 1, 10.0)
    config = PoolConfig(**(limits | changes))
    return Pool(URLS[:count], config, turns, Counters(), second_opinion=second_opinion)


def calls(count, read=operator.attrgetter("json")):
    return [Call("/path", {"place": place}, read) for place in range(count)]


def fail(kind, **fields):
    raise AttemptFailed(kind, f"it was {kind}", **fields)


def script(*outcomes):
    """Each attempt in turn: a failure is raised, anything else is the answer."""
    left = iter(outcomes)

    def answer(url, body):
        outcome = next(left)
        if isinstance(outcome, AttemptFailed):
            raise outcome
        return outcome

    return answer


DOWN = AttemptFailed("http_500", "http 500")
NO_MODEL = AttemptFailed("http_404", "http 404", retry="elsewhere")
TOO_LONG = AttemptFailed("http_400", "http 400", retry="never", blame=False)


def test_answers_come_in_order_and_no_calls_need_no_server(serve):
    async def answer(url, body):
        await asyncio.sleep(0.02 / (1 + body["place"]))
        return body["place"]

    network = serve(answer)
    pool = make_pool(in_flight=5)
    assert post_all(pool, calls(12)) == list(range(12))
    assert post_all(pool, []) == []
    assert pool.numbers() == {"attempts": 12.0}
    assert network.closed == {A: 1}


def test_no_more_than_asked_for_are_in_flight(serve):
    counters = Counters()

    async def answer(url, body):
        with counters.at_once("peak"):
            await asyncio.sleep(0.005)

    network = serve(answer)
    post_all(make_pool(2, in_flight=20), calls(60))
    assert counters.numbers()["peak"] == 20
    assert network.closed == {A: 2, B: 2}  # small clients: for 16 connections each
    assert collections.Counter(network.seen) == {A: 30, B: 30}


def test_reads_are_told_the_seconds_of_the_attempt_and_of_all(serve):
    outcomes = script(DOWN, "late")

    async def answer(url, body):
        await asyncio.sleep(0.05)
        return outcomes(url, body)

    serve(answer)
    (answer,) = post_all(make_pool(), calls(1, lambda answer: answer))
    assert isinstance(answer, Answer) and answer.json == "late"
    assert 0.04 < answer.seconds < answer.call_seconds - 0.04 < 5


def test_the_last_reason_stands_when_the_tries_are_used_up(serve):
    serve(script(*(AttemptFailed("x", f"reason {n}") for n in (1, 2, 3))))
    pool = make_pool()
    (failed,) = post_all(pool, calls(1))
    assert (failed.kind, failed.reason, str(failed)) == ("x", "reason 3", "http://a: reason 3")
    assert 0 < failed.seconds < 5
    assert pool.numbers() == {"attempts": 3.0, "retries": 2.0}


def test_a_failure_to_read_is_tried_again_like_any_other(serve):
    network = serve(lambda url, body: url)
    pool = make_pool(2)
    read = {A: lambda: fail("odd"), B: lambda: "good"}
    assert post_all(pool, calls(1, lambda answer: read[answer.json]())) == ["good"]
    assert network.seen == [A, B]
    assert pool.turns.told == [(0, "odd"), (1, None)]


def test_a_server_that_answered_works_unless_what_it_sent_is_its_fault(serve):
    serve(script(DOWN, "unclear", "spoilt", TOO_LONG))
    pool = make_pool(tries=9, second_opinion=True)

    def read(answer):
        return fail(answer.json, blame=answer.json == "spoilt")

    (failed,) = post_all(pool, calls(1, read))
    assert failed.kind == "http_400"
    assert pool.turns.told == [(0, "http_500"), (0, None), (0, "spoilt"), (0, "http_400")]


def test_what_one_server_lacks_is_asked_of_those_that_did_not_say_so(serve):
    network = serve(lambda url, body: fail("http_404", retry="elsewhere"))
    (failed,) = post_all(make_pool(3, tries=9), calls(1))
    assert network.seen == [A, B, C] and failed.url == C
    alone = serve(lambda url, body: fail("http_404", retry="elsewhere"))
    post_all(make_pool(1), calls(1))
    assert alone.seen == [A]
    network = serve(script(DOWN, NO_MODEL, "good"))
    assert post_all(make_pool(2), calls(1)) == ["good"]
    assert network.seen == [A, B, A]  # the first one was only down


def test_what_is_refused_for_good_is_asked_elsewhere_by_who_wants_a_second_opinion(serve):
    network = serve(script(TOO_LONG))
    took = pytest.approx(0, abs=5)
    assert post_all(make_pool(3), calls(1)) == [Failed("http_400", "http 400", A, took, "never")]
    network = serve(script(TOO_LONG, "good"))
    assert post_all(make_pool(3, second_opinion=True), calls(1)) == ["good"]
    assert network.seen == [A, B]
    network = serve(lambda url, body: fail("http_400", retry="never", blame=False))
    pool = make_pool(3, second_opinion=True, tries=9)
    pool.turns.usable = frozenset({0, 2})
    post_all(pool, calls(1))
    assert network.seen == [A, C]


def test_a_pause_is_waited_for_up_to_the_longest_wait_and_only_without_another_server(serve):
    slow = AttemptFailed("http_429", "http 429", blame=False, pause_s=3600.0)
    for count, waits in ((1, True), (2, False)):
        serve(script(slow, "good"))
        started = time.monotonic()
        assert post_all(make_pool(count, max_wait_s=0.4), calls(1)) == ["good"]
        assert (time.monotonic() - started > 0.35) == waits


def test_a_call_ends_within_its_limit_and_all_turns_are_given_back(serve):
    async def answer(url, body):
        await asyncio.sleep(60 * bool(body["place"]))

    serve(answer)
    pool = make_pool(2, call_timeout_s=0.2)
    started = time.monotonic()
    answers = post_all(pool, calls(5))
    assert time.monotonic() - started < 5
    assert answers == [None] + [Failed(pool_lib.LATE, "no answer within call_timeout_s=0.2")] * 4
    assert str(answers[1]) == "no answer within call_timeout_s=0.2"
    told = pool.turns.told
    assert sorted(server for server, _ in told) == sorted(pool.turns.taken) and len(told) == 3
    assert {kind for _, kind in told} == {None, "cancelled"}


def test_the_watch_is_around_every_attempt_and_sees_it_fail(serve):
    seen = []

    @contextlib.contextmanager
    def watch():
        try:
            yield
        except AttemptFailed as failure:
            seen.append(failure.kind)
            raise
        seen.append("ended")

    serve(script(DOWN, "odd", "good"))
    pool = dataclasses.replace(make_pool(), watch=watch)

    def read(answer):
        return answer.json if answer.json == "good" else fail(answer.json)

    assert post_all(pool, calls(1, read)) == ["good"]
    assert seen == ["http_500", "odd", "ended"]


def test_a_bug_is_not_a_failed_call(serve):
    serve(lambda url, body: url)
    with pytest.raises(ExceptionGroup) as error:
        post_all(make_pool(), calls(5, lambda answer: 1 / 0))
    assert error.group_contains(ZeroDivisionError)


def test_from_inside_a_running_loop(serve):
    serve(lambda url, body: body["place"])

    async def inside():
        return post_all(make_pool(), calls(3))

    assert asyncio.run(inside()) == [0, 1, 2]


def test_a_failure_says_whether_it_may_pass(serve):
    serve(script(NO_MODEL, DOWN, NO_MODEL))
    (failed,) = post_all(make_pool(2), calls(1))
    assert (failed.reason, failed.retry) == ("http 404", "again")  # the other server was only down
    serve(script(NO_MODEL, NO_MODEL))
    assert post_all(make_pool(2), calls(1))[0].retry == "elsewhere"


def test_patience_outlasts_a_server_that_is_away_and_nothing_else(serve, caplog):
    """Away for longer than its tries last; what is no absence is not waited for."""
    started = time.monotonic()

    def returns(url, body):
        away = time.monotonic() - started < 0.4
        return fail("connection") if away else "back"

    network = serve(returns)
    patient = make_pool(tries=2, wait_s=0.01, max_wait_s=0.02, patience_s=30.0)
    assert post_all(patient, calls(3)) == ["back"] * 3
    assert len(network.seen) > 9
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"{A} is away (it was connection); waiting for up to patience_s=30", f"{A} is back"]
    for kind in ("http_500", "timeout", "misfit"):
        network = serve(lambda url, body, kind=kind: fail(kind))
        assert post_all(patient, calls(1))[0].kind == kind and len(network.seen) == 2


def test_patience_ends(serve):
    network = serve(lambda url, body: fail("http_503"))
    started = time.monotonic()
    (failed,) = post_all(make_pool(tries=2, wait_s=0.01, max_wait_s=0.02, patience_s=0.3), calls(1))
    assert failed.kind == "http_503" and 0.25 < time.monotonic() - started < 5 and len(network.seen) > 2
    network = serve(lambda url, body: fail("http_503"))
    post_all(make_pool(tries=3), calls(1))
    assert len(network.seen) == 3


def test_a_server_that_was_away_is_welcomed_before_it_is_asked(serve):
    """A welcome that fails is a failed attempt, and is made again."""
    away = AttemptFailed("connection", "connection failed")
    network = serve(script(away, away, away, "hello", "first", "second"))
    pool = dataclasses.replace(
        make_pool(tries=4), welcome=lambda place: Call("/w", {}, operator.attrgetter("json"))
    )
    assert post_all(pool, calls(1)) == ["first"] and len(network.seen) == 5
    assert post_all(pool, calls(1)) == ["second"]


def test_a_server_is_welcomed_once_by_whoever_comes_first(serve):
    async def answer(url, body):
        seen.append(body)
        await asyncio.sleep(0.01)
        return fail("http_503") if len(seen) <= 5 else body

    seen = []
    serve(answer)
    welcome = Call("/w", {"hello": True}, str)
    pool = dataclasses.replace(make_pool(in_flight=5), welcome=lambda place: welcome)
    assert post_all(pool, calls(5)) == [{"place": place} for place in range(5)]
    assert seen[5] == {"hello": True} and seen.count({"hello": True}) == 1


def test_an_answer_from_before_a_server_went_away_is_no_return(serve):
    """The first request is answered after the second met nobody: what follows is welcomed all the same."""

    async def answer(url, body):
        seen.append(body)
        if body == {"place": 1}:
            fail("connection")
        await asyncio.sleep(0.05)
        return body

    seen = []
    serve(answer)
    pool = dataclasses.replace(make_pool(tries=1), welcome=lambda place: Call("/w", {"hello": True}, str))
    first, second = post_all(pool, calls(2))
    assert first == {"place": 0} and second.kind == "connection"
    assert post_all(pool, calls(1)) == [{"place": 0}] and seen[2:] == [{"hello": True}, {"place": 0}]
