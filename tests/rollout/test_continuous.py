"""Places that take rows one by one are the same in every decode layout."""

import dataclasses

import jax
import numpy as np
import pytest

from gtalign_jax.models.config import RuntimeConfig
from gtalign_jax.models.transformer import init_params
from gtalign_jax.rollout import continuous
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.continuous import STEPS, Row
from gtalign_jax.rollout.engine import Engine
from tests.small import small_model

MODEL = small_model(304, num_layers=1)


def told(layout: str) -> dict[int, list[int]]:
    """What three rows write that sit down at different times, a short prompt where a long one may stand."""
    model = dataclasses.replace(MODEL, runtime=RuntimeConfig(decode_layout=layout))
    engine = Engine(None, model, (), buckets=BucketConfig(prompt=(4, 16), completion=(12,)))
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), model)
    places = continuous.open_places(engine, params, 2)
    state = continuous.empty(places)
    rows = {0: Row([1, 2, 3], 5, 12), 1: Row([9] * 15, 6, 3), 2: Row([4], 7, 12, temperature=0.0)}
    written, sitting = {name: [] for name in rows}, {}
    for name, place in ((0, 0), (1, 1), (2, 1), (None, None), (None, None)):
        if name is not None:
            state = continuous.seat(places, state, rows[name], place)
            sitting[place] = name
        state, seen = continuous.advance(places, state)
        assert seen.tokens.shape == (2, STEPS + 1)
        for at, who in sitting.items():
            new = slice(len(written[who]) - seen.first[at], seen.length[at] - seen.first[at])
            written[who] += seen.tokens[at, new].tolist()
    assert {name: len(ids) for name, ids in written.items()} == {0: 12, 1: 3, 2: 12}
    return written


def test_both_layouts_write_the_same():
    assert told("features") == told("rows")


@pytest.mark.parametrize("layout", ["features", "rows"])
@pytest.mark.parametrize("age", [0, 5])
def test_a_row_that_goes_on_from_another_in_its_place_is_the_row_with_the_whole_prompt(layout, age):
    """Of tokens that the other has, some are kept; also when the ring has come round before."""
    runtime = RuntimeConfig(decode_layout=layout, scan_layers=layout == "features")
    model = dataclasses.replace(MODEL, num_layers=2, runtime=runtime)
    engine = Engine(None, model, (), buckets=BucketConfig(prompt=(4, 40), completion=(20,)))
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), model)
    places = continuous.open_places(engine, params, 2)

    def written(kept):
        state = continuous.seat(places, continuous.empty(places), Row([7], 3, 20), 0)
        for _ in range(age):
            state, _ = continuous.advance(places, state)
        first = Row([1, 2, 3], 5, 20, 0.0)
        state = continuous.seat(places, state, first, 1)
        for _ in range(2):
            state, seen = continuous.advance(places, state)
        own = state.completions.tokens[1, 0, (state.start[1, 0] + np.arange(10)) % 20].tolist()
        prompt = [*first.prompt, *own[:9], 11, 12, 13]
        row = Row(prompt, 5, 8, 0.0, first=12)
        if kept is None:
            state = continuous.seat(places, state, row, 1)
        else:
            state = continuous.reseat(places, state, row, 1, kept)
        state, seen = continuous.advance(places, state)
        new = slice(-seen.first[1], seen.length[1] - seen.first[1])
        return seen.tokens[1, new].tolist(), seen.logp[1, new]

    tokens, logp = written(None)
    assert len(tokens) == 8
    for kept in (1, 3, 12):
        again, others = written(kept)
        assert again == tokens
        np.testing.assert_allclose(others, logp, atol=1e-4)


def test_the_clock_begins_again_and_no_row_hears_of_it():
    """A hundred turns of the ring; a place that nobody takes for so long does not wake up."""
    engine = Engine(None, MODEL, (), buckets=BucketConfig(prompt=(4,), completion=(12,)))
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), MODEL)
    places = continuous.open_places(engine, params, 2)
    state = continuous.seat(places, continuous.empty(places), Row([8], 3, 2), 0)
    found = set()
    for _ in range(100):
        state = continuous.seat(places, state, Row([5, 6], 1, 9), 1)
        for _ in range(2):
            state, seen = continuous.advance(places, state)
        new = slice(-seen.first[1], seen.length[1] - seen.first[1])
        found.add(tuple(seen.tokens[1, new].tolist()))
        assert 12 <= int(state.t) < 24
        assert seen.length.tolist() == [2, 9]
    assert len(found) == 1 and np.asarray(state.start)[0, 0] < -700
