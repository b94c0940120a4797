"""Rows that come one by one: each gets what it would get alone, and nothing compiles for it."""

import dataclasses
import queue

import jax
import numpy as np
import pytest

from gtalign_jax.errors import UserError
from gtalign_jax.models.transformer import forward, init_params, unembed
from gtalign_jax.rollout import continuous, generate, programs
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.continuous import STEPS, TOP, Row
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.serving.server.scheduler import FAILED, LENGTH, STOP, Closed, Scheduler, Ticket
from tests.small import small_model

MODEL = small_model(304)
BUCKETS = BucketConfig(prompt=(8, 16), completion=(24,))
ENDS = tuple(range(0, 304, 16))


@pytest.fixture(scope="module")
def places():
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), MODEL)
    return continuous.open_places(Engine(None, MODEL, ENDS, buckets=BUCKETS), params, 4)


@pytest.fixture(scope="module")
def scheduler(places):
    scheduler = Scheduler(places)
    yield scheduler
    scheduler.close(30)
    assert not scheduler.alive


def rows(count: int) -> list[Row]:
    """Short and long prompts, greedy and sampled rows, budgets from 1 on."""
    rng = np.random.default_rng(count)
    return [
        Row(
            prompt=rng.integers(1, 300, rng.integers(1, 17)).tolist(),
            seed=i,
            max_new_tokens=int(rng.integers(1, 25)),
            temperature=(1.0, 0.0, 0.7)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            top=i % 5 == 0,
        )
        for i in range(count)
    ]


class Listener:
    """Collects what one row is told."""

    def __init__(self):
        self.told, self.ids, self.logps, self.likely = queue.Queue(), [], [], []

    def wait(self) -> str:
        """Until it is done; how it ended."""
        while True:
            tokens = self.told.get(timeout=60)
            self.ids += tokens.ids
            self.logps += tokens.logps
            self.likely += tokens.likely
            if tokens.done:
                return tokens.done


def written(scheduler, asked) -> list[tuple[list[int], str]]:
    """What each row gets when all are asked for at once."""
    listeners = [Listener() for _ in asked]
    for row, listener in zip(asked, listeners, strict=True):
        scheduler.submit(row, listener.told.put)
    ends = [listener.wait() for listener in listeners]
    return [(listener.ids, end) for listener, end in zip(listeners, ends, strict=True)]


def test_a_row_gets_the_same_tokens_alone_and_among_fifteen_others(scheduler):
    asked = rows(16)
    together = written(scheduler, asked)
    alone = [written(scheduler, [row])[0] for row in asked]
    backwards = written(scheduler, asked[::-1])[::-1]
    assert together == alone == backwards
    assert {end for _, end in alone} == {STOP, LENGTH}
    for row, (ids, end) in zip(asked, alone, strict=True):
        assert not set(ids[:-1]) & set(ENDS) and (ids[-1] in ENDS) == (end == STOP)
        assert end == STOP or len(ids) == row.max_new_tokens
    assert len({len(ids) for ids, _ in alone}) > 5


@pytest.mark.parametrize(
    "sampling", [SamplingConfig(temperature=0.0), SamplingConfig(temperature=0.7, top_p=0.9)]
)
def test_a_row_is_what_a_generation_of_its_seed_draws(scheduler, places, sampling):
    prompts = [[5, 6, 7], [9] * 12, [11]]
    asked = [Row(p, 70 + i, 24, sampling.temperature, sampling.top_p) for i, p in enumerate(prompts)]
    engine = Engine(None, MODEL, ENDS, sampling, BUCKETS)
    batch, seeds = engine_lib.prompt_batch(engine, prompts), np.arange(70, 73)[:, None]
    request = Request(batch, jax.random.key(0), 1, 24, seeds=seeds)
    made = generate.rollout(engine, places.params, request).completions
    whole = [ids.tolist() for ids in engine_lib.completion_ids(made)]
    assert [ids for ids, _ in written(scheduler, asked)] == whole


def test_a_row_that_goes_on_draws_what_it_would_have_drawn(scheduler):
    several = [Row([3, 4, 5], seed, 13) for seed in range(9)]
    whole, row = max(
        (ids, row) for (ids, _), row in zip(written(scheduler, several), several, strict=True) if len(ids) > 8
    )
    rest = Row([*row.prompt, *whole[:6]], row.seed, row.max_new_tokens - 6, first=6)
    assert written(scheduler, [rest])[0][0] == whole[6:]


def test_a_row_that_goes_on_from_another_takes_its_place(scheduler, monkeypatch):
    """Before those who wait; when the other is gone, it is computed whole. The same tokens either way."""
    several = [Row([3, 4, 5], seed, 24) for seed in range(9)]
    ids, row = max(
        ((ids, row) for (ids, _), row in zip(written(scheduler, several), several, strict=True)),
        key=lambda pair: len(pair[0]),
    )
    rest = Row([*row.prompt, *ids[:6], 11, 12, 13], row.seed, 10, first=9)
    alone = written(scheduler, [rest])[0]
    seated, reseat = [], continuous.reseat
    monkeypatch.setattr(continuous, "reseat", lambda *given: seated.append(given[1:]) or reseat(*given))
    first, crowd = Listener(), [Listener() for _ in range(20)]
    ticket = scheduler.submit(row, first.told.put)
    first.told.get(timeout=60)
    for i, listener in enumerate(crowd):
        scheduler.submit(Row([2], i, 24, top_p=0.99), listener.told.put)
    for gone in (False, True):
        follower = Listener()
        scheduler.follow(ticket, rest, follower.told.put, 9)
        assert (follower.wait(), follower.ids) == alone[::-1]
        assert len(seated) == 1 and seated[0][-1] == 9
        scheduler.cancel(ticket)
        assert gone or any(not listener.told.qsize() for listener in crowd)
    for listener in crowd:
        listener.wait()
    assert scheduler.load() == dataclasses.replace(scheduler.load(), waiting=0, seated=0)


def test_log_probabilities_are_the_models_own(scheduler):
    """Whatever the temperature: greedy, heated and filtered rows that drew the same token say the same."""
    said = {}
    for seed in range(12):
        for temperature, top_p in ((0.0, 1.0), (0.5, 1.0), (1.0, 0.5)):
            listener = Listener()
            scheduler.submit(Row([7, 8], seed, 1, temperature, top_p), listener.told.put)
            listener.wait()
            said.setdefault(listener.ids[0], []).append(listener.logps[0])
    assert max(map(len, said.values())) > 12
    for values in said.values():
        np.testing.assert_allclose(values, values[0], atol=1e-5)
    assert sum(np.exp(values[0]) for values in said.values()) <= 1


def test_the_likeliest_tokens_are_the_models_own(scheduler, places):
    """At every step, of the row that asked alone, whatever is drawn and by whom."""
    several = [Row([7, 8, 9], seed, 24) for seed in range(9)]
    _, row = max(zip(written(scheduler, several), several, strict=True), key=lambda pair: len(pair[0][0]))
    asked = [dataclasses.replace(row, top=True), row, Row([1], 4, 24, 0.0, 0.5)]
    listeners = [Listener() for _ in asked]
    for row, listener in zip(asked, listeners, strict=True):
        scheduler.submit(row, listener.told.put)
    for listener in listeners:
        listener.wait()
    assert [len(listener.likely) for listener in listeners] == [len(listeners[0].ids), 0, 0]
    assert listeners[0].ids == listeners[1].ids and len(listeners[0].ids) > 5
    row = np.array([[7, 8, 9, *listeners[0].ids]])
    hidden = forward(places.params, MODEL, row, np.array([row.size]))
    logp = np.asarray(jax.nn.log_softmax(unembed(places.params, MODEL, hidden)))[0, 2:-1]
    for found, expected in zip(listeners[0].likely, logp, strict=True):
        best = np.argsort(-expected)[:TOP]
        np.testing.assert_allclose([value for _, value in found], expected[best], atol=1e-4)
        np.testing.assert_allclose(expected[[token for token, _ in found]], expected[best], atol=1e-4)


def test_nothing_compiles_after_the_warm_up_and_the_clock_never_runs_away(scheduler):
    compiled, listening = [], True

    def listen(event: str, duration: float, **_) -> None:
        if listening and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    warm = programs.compiled_programs()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        written(scheduler, rows(40))
        assert programs.compiled_programs() == warm
        assert not compiled
    finally:
        listening = False
    assert BUCKETS.completion[-1] <= int(scheduler._state.t) < 2 * BUCKETS.completion[-1]


def test_a_cancelled_row_is_told_nothing_more_and_its_place_is_free(scheduler):
    asked = [Row([2], i, 24, top_p=0.99) for i in range(60)]
    listeners = [Listener() for _ in asked]
    tickets = [scheduler.submit(row, x.told.put) for row, x in zip(asked, listeners, strict=True)]
    for ticket in tickets[1:]:
        scheduler.cancel(ticket)
    before = [listener.told.qsize() for listener in listeners[1:]]
    assert listeners[0].wait() in (STOP, LENGTH)
    (ids, _), (alone, _) = written(scheduler, [asked[-1]])[0], written(scheduler, [asked[-1]])[0]
    assert ids == alone
    assert sum(x.told.qsize() - n for x, n in zip(listeners[1:], before, strict=True)) <= 4
    load = scheduler.load()
    assert (load.waiting, load.seated, load.failures) == (0, 0, 0)


def test_a_device_that_fails_gives_up_its_rows_and_serves_the_next(scheduler, monkeypatch):
    asked = Row([4, 4], 9, 20)
    expected = written(scheduler, [asked])
    advance, broken = continuous.advance, iter([RuntimeError("RESOURCE_EXHAUSTED")])

    def failing(places, state):
        for error in broken:
            raise error
        return advance(places, state)

    monkeypatch.setattr(continuous, "advance", failing)
    assert written(scheduler, [asked]) == [([], FAILED)]
    assert written(scheduler, [asked]) == expected
    assert scheduler.load().failures == 1


def test_what_no_place_holds_is_refused_at_once(scheduler):
    for row, said in (
        (Row([], 0, 1), "no tokens"),
        (Row([1] * 17, 0, 1), "17 slots"),
        (Row([1], 0, 0), "max_new_tokens=0"),
        (Row([1], 0, 25), "from 1 to 24"),
        (Row([1], 0, 1, held=True), "grammar: these places have none"),
        (Row([1], 0, 1, stops=True), "stop string: these places have none"),
    ):
        with pytest.raises(UserError, match=said):
            scheduler.submit(row, print)
    small = Engine(None, MODEL, ENDS, buckets=BucketConfig(prompt=(8,), completion=(STEPS,)))
    with pytest.raises(UserError, match="needs more than 8"):
        continuous.open_places(small, {}, 4)


def test_closing_answers_those_who_wait_and_nobody_else(places):
    scheduler, listeners = Scheduler(places), [Listener() for _ in range(9)]
    for row, listener in zip(rows(9), listeners, strict=True):
        scheduler.submit(row, listener.told.put)
    scheduler.close(60)
    assert not scheduler.alive
    assert {listener.wait() for listener in listeners} <= {STOP, LENGTH}
    with pytest.raises(Closed):
        scheduler.submit(Row([1], 0, 1), print)
    with pytest.raises(Closed):
        scheduler.follow(Ticket(Row([1], 0, 1), print), Row([1, 2], 0, 1), print, 1)
