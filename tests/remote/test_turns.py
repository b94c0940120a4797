"""Whose turn it is, on a clock we turn by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtalign_jax.remote.client import AttemptFailed
from gtalign_jax.remote.turns import Turns

DOWN = AttemptFailed("http_500", "http 500")
REFUSED = AttemptFailed("http_400", "http 400", retry="never", blame=False)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def make_turns(count, skip_after=2, skip_s=10.0, least_busy=False):
    clock = Clock()
    return Turns(count, skip_after, skip_s, least_busy=least_busy, clock=clock), clock


def ask(turns, tried=(), failure=None):
    """A whole attempt: (server, pause)."""
    server, pause = turns.take(tried)
    turns.give_back(server, failure)
    return server, pause


def take(turns, n):
    """Attempts that begin and do not end: on their own they change nothing but who is busy."""
    return [turns.take().server for _ in range(n)]


def test_round_robin():
    turns, _ = make_turns(3)
    assert take(turns, 7) == [0, 1, 2, 0, 1, 2, 0]


def test_failures_in_a_row_rest_a_server_and_time_brings_it_back():
    turns, clock = make_turns(2)
    turns.give_back(0, DOWN)
    assert take(turns, 4) == [0, 1, 0, 1]  # one failure is not enough
    turns.give_back(0, DOWN)
    assert take(turns, 4) == [1, 1, 1, 1]
    clock.now += 10.1
    assert set(take(turns, 2)) == {0, 1}
    turns.give_back(0, DOWN)  # still failing: rests again at once
    assert take(turns, 2) == [1, 1]
    turns.give_back(0)
    assert set(take(turns, 2)) == {0, 1}


def test_an_answer_between_failures_starts_the_count_anew():
    turns, _ = make_turns(2)
    for _ in range(5):
        turns.give_back(0, DOWN)
        turns.give_back(0)
    assert set(take(turns, 2)) == {0, 1}


def test_what_is_the_fault_of_the_request_neither_counts_nor_clears_the_count():
    turns, _ = make_turns(2)
    for _ in range(5):
        turns.give_back(0, REFUSED)
    assert set(take(turns, 2)) == {0, 1}
    for failure in (DOWN, REFUSED, DOWN):
        turns.give_back(1, failure)
    assert take(turns, 2) == [0, 0]


def test_a_pause_is_kept_only_where_there_is_no_other_server():
    slow = AttemptFailed("http_429", "http 429", blame=False, pause_s=3.0)
    turns, clock = make_turns(2)
    turns.give_back(0, slow)
    assert [turns.take() for _ in range(3)] == [(1, 0.0)] * 3
    turns.give_back(1, AttemptFailed("http_429", "http 429", blame=False, pause_s=1.0))
    assert turns.take() == (1, 1.0)  # the one that is free first
    clock.now += 5
    assert set(take(turns, 2)) == {0, 1}
    alone, _ = make_turns(1)
    alone.give_back(0, slow)
    assert alone.take(tried=[0]) == (0, 3.0)


@pytest.mark.parametrize("least_busy", [False, True])
def test_a_retry_goes_elsewhere_if_there_is_an_elsewhere(least_busy):
    turns, _ = make_turns(2, least_busy=least_busy)
    assert [turns.take(tried=[0]).server for _ in range(3)] == [1, 1, 1]
    for _ in range(2):
        turns.give_back(1, DOWN)
    assert turns.take(tried=[0]).server == 1  # resting, but the other one has just failed this request


@pytest.mark.parametrize("least_busy", [False, True])
def test_a_request_visits_every_server_before_it_returns_to_one(least_busy):
    turns, _ = make_turns(3, least_busy=least_busy)
    ask(turns)  # another request has moved the turn on
    tried = []
    for _ in range(3):
        tried.append(ask(turns, tried)[0])
        ask(turns)
    assert sorted(tried) == [0, 1, 2]
    for _ in range(2):
        turns.give_back(2, DOWN)
    assert turns.take(tried=[0, 1]).server == 0  # the untried one rests: better a server that answers


def test_who_refused_a_request_is_asked_for_it_last():
    turns, _ = make_turns(3)
    turns.take()
    assert turns.take(tried=[0, 1, 2], refused={0}).server == 1
    assert turns.take(tried=[0, 1], refused={0}).server == 2
    for _ in range(2):
        turns.give_back(2, DOWN)
    assert turns.take(tried=[0, 1], refused={0}).server == 2  # it rests, but may say something else
    assert turns.take(tried=[0, 1], refused={0, 2}).server == 0


def test_the_least_busy_comes_first_and_equals_take_turns():
    turns, _ = make_turns(3, least_busy=True)
    assert take(turns, 6) == [0, 1, 2, 0, 1, 2]
    turns.give_back(1)
    turns.give_back(1)
    assert take(turns, 2) == [1, 1]
    turns.give_back(2)
    assert take(turns, 2) == [2, 0]


def test_a_least_busy_server_that_failed_is_asked_only_when_the_others_did_too():
    turns, clock = make_turns(2, skip_after=1, least_busy=True)
    turns.give_back(turns.take().server, DOWN)
    assert take(turns, 5) == [1] * 5
    turns.give_back(1, DOWN)
    assert turns.take().server == 0  # both rest
    clock.now += 10.1
    assert turns.take().server == 0  # neither does


@pytest.mark.parametrize("least_busy", [False, True])
def test_only_usable_servers_are_asked(least_busy):
    turns, _ = make_turns(3, least_busy=least_busy)
    turns.usable = frozenset({0, 2})
    assert [ask(turns)[0] for _ in range(4)] == [0, 2, 0, 2]
    turns.usable = frozenset({1})
    assert ask(turns, tried=[1])[0] == 1


EVENTS = st.tuples(st.integers(0, 2), st.sampled_from(["ok", "fail", "pause", "refuse", "tick"]))


@given(st.lists(EVENTS, max_size=60), st.booleans())
def test_some_server_is_always_named_with_a_bounded_wait(events, least_busy):
    turns, clock = make_turns(3, least_busy=least_busy)
    for index, event in events:
        if event == "tick":
            clock.now += 1.0
        elif event == "ok":
            turns.give_back(index)
        else:
            pause_s = 4.0 if event == "pause" else 0.0
            turns.give_back(index, AttemptFailed("x", "x", blame=event != "refuse", pause_s=pause_s))
        server, wait = turns.take(tried=[index])
        assert server in {0, 1, 2} - {index} and 0 <= wait <= 4.0
