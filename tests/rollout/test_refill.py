"""A queue changes the work and nothing else: every row is what it is when all are decoded at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtalign_jax.mesh.sharding import MeshConfig, make_mesh
from gtalign_jax.models.config import RuntimeConfig
from gtalign_jax.models.transformer import forward, init_params, unembed
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generate, programs, refill
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.generator import EngineConfig
from gtalign_jax.rollout.request import Ending, Request
from gtalign_jax.rollout.sampling import GREEDY, SamplingConfig
from tests.small import small_model

BUCKETS = BucketConfig(prompt=(8, 16), completion=(6, 12), batch=(16,))
MODEL = small_model(304, num_layers=1, window=5, window_layers=(True,))
ENDS = tuple(range(0, 304, 8))
EXACT = ("tokens", "length", "finished", "action_mask")


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=1)(jax.random.key(0), MODEL)


@pytest.fixture
def engine(tokenizer) -> Engine:
    return Engine(tokenizer, MODEL, ENDS, buckets=BUCKETS)


def prompts(count: int, longest: int = 8, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    found = [rng.integers(2, 300, rng.integers(1, longest + 1)).tolist() for _ in range(count)]
    return [[1] * longest, *found[1:]]


def same(one, two) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.prompts, two.prompts)
    one, two = one.completions, two.completions
    for name in EXACT:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    np.testing.assert_allclose(one.logp, two.logp, atol=1e-5)


@jax.jit
def _argmax(params, tokens, length):
    return unembed(params, MODEL, forward(params, MODEL, tokens, length)).argmax(-1)


def teacher_forced(params, rollout) -> list[list[int]]:
    """The likeliest token after each token of each row, from whole rows without a cache."""
    given, group = rollout.prompts, rollout.completions.length.shape[1]
    rows = engine_lib.completion_ids(rollout.completions)
    starts = np.repeat(np.asarray(given.length), group)
    tokens = np.zeros((len(rows), BUCKETS.prompt[-1] + BUCKETS.completion[-1]), np.int32)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens[i, : start + len(row)] = [*np.asarray(given.tokens[i // group, :start]), *row]
    likeliest = np.asarray(_argmax(params, tokens, starts + [len(row) for row in rows]))
    spans = zip(likeliest, starts, rows, strict=True)
    return [after[start - 1 : start - 1 + len(row)].tolist() for after, start, row in spans]


@pytest.mark.parametrize(
    ("mesh", "layout", "compact_every"),
    [
        (None, "auto", 0),
        (None, "auto", 2),
        (MeshConfig(data=2, tensor=4), "rows", 2),
        (MeshConfig(data=2, tensor=2, context=2), "gathered", 0),
    ],
    ids=["one", "one-compacted", "eight-compacted", "eight-gathered"],
)
def test_greedy_tokens_are_the_teacher_forced_argmax_in_every_bucket(
    engine, params, mesh, layout, compact_every
):
    """Ragged prompts and ends, five times as many rows as places: the ring wraps many times."""
    model = dataclasses.replace(MODEL, runtime=RuntimeConfig(decode_layout=layout))
    if mesh is not None:
        mesh = make_mesh(mesh)
        params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    changes = {"sampling": GREEDY, "compact_every": compact_every, "mesh": mesh, "rows": 8}
    engine = dataclasses.replace(engine, model_config=model, **changes)
    lengths = set()
    for slots, budget in zip(BUCKETS.prompt, BUCKETS.completion, strict=True):
        batch = engine_lib.prompt_batch(engine, prompts(21, slots, seed=slots))
        rollout = generate.rollout(engine, params, Request(batch, jax.random.key(0), 2, budget))
        made = rollout.completions
        assert rollout.prompts.tokens.shape == (21, slots) and made.tokens.shape == (21, 2, budget)
        rows = [row.tolist() for row in engine_lib.completion_ids(made)]
        assert rows == teacher_forced(jax.device_get(params), rollout)
        for row, finished in zip(rows, made.finished.reshape(-1), strict=True):
            assert not set(row[:-1]) & set(ENDS) and finished == (row[-1] in ENDS)
            assert finished or len(row) == budget
        lengths |= {len(row) for row in rows}
    assert len(lengths) > 6


@pytest.mark.parametrize("layout", ["rows", "features"])
def test_sampled_rows_are_those_without_a_queue(engine, params, layout):
    """Penalty, filters, a stop string and a budget below its bucket, in both decode layouts."""
    sampling = SamplingConfig(repetition_penalty=1.3, temperature=0.9, top_k=90, top_p=0.97)
    model = dataclasses.replace(MODEL, runtime=RuntimeConfig(decode_layout=layout))
    engine = dataclasses.replace(engine, sampling=sampling, model_config=model)
    ending = engine_lib.make_ending(engine, ["e"])
    batch, key = engine_lib.prompt_batch(engine, prompts(13)), jax.random.key(8)
    queue = dataclasses.replace(engine, rows=5, compact_every=3)
    request = Request(batch, key, 2, 11, ending=ending)
    one, two = (jax.device_get(generate.rollout(e, params, request)) for e in (engine, queue))
    same(one, two)
    length = one.completions.length
    assert len(set(length.ravel().tolist())) > 5 and length.max() == 11
    assert not one.completions.finished.all()


def test_a_queue_under_the_grammar(tokenizer):
    """A fifth of the tokens, bytes beyond ASCII, end a chain, so that rows end at different steps."""
    model = dataclasses.replace(MODEL, vocab_size=len(tokenizer))
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(1), model)
    buckets = BucketConfig(prompt=(8,), completion=(512,))
    ends = (tokenizer.eos_token_id, *range(120, 180))
    engine = Engine(tokenizer, model, ends, buckets=buckets)
    constraint = engine_lib.make_constraint(engine)
    constraint = constraint._replace(limit=np.minimum(constraint.limit, 10))
    budget = int(constraint.distance[0]) + 60
    batch = engine_lib.prompt_batch(engine, prompts(4))
    request = Request(batch, jax.random.key(2), 2, budget, constraint=constraint)
    queue = dataclasses.replace(engine, rows=3, compact_every=50)
    one, two = (jax.device_get(generate.rollout(e, params, request)) for e in (engine, queue))
    same(one, two)
    made = two.completions
    assert made.finished.all() and len(set(made.length.ravel().tolist())) > 1


def test_seeds_parts_and_calls_beyond_the_batch_bucket(engine, params):
    queue = dataclasses.replace(engine, rows=6)
    texts, key = prompts(20), jax.random.key(3)
    request = Request(engine_lib.prompt_batch(queue, texts), key, 2, 12)
    whole = generate.rollout(queue, params, request)
    tail = request.replace(prompts=engine_lib.prompt_batch(engine, texts[12:]), first_row=12)
    part = generate.rollout(engine, params, tail)
    np.testing.assert_array_equal(whole.completions.tokens[12:], part.completions.tokens)
    seeds = np.random.default_rng(0).integers(0, 1000, (8, 2))
    seeded = request.replace(prompts=engine_lib.prompt_batch(engine, texts[:8]), seeds=seeds)
    one, two = (generate.rollout(e, params, seeded) for e in (engine, queue))
    same(jax.device_get(one), two)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one", "eight"])
def test_nothing_compiles_after_warm_up(engine, params, mesh):
    """Any number of prompts, any ends and budgets run on the programs of the buckets."""
    if mesh is not None:
        mesh = make_mesh(mesh)
        params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    buckets = BucketConfig(prompt=(8,), completion=(12,))
    engine = dataclasses.replace(engine, buckets=buckets, mesh=mesh, rows=8, compact_every=2)
    compiled, listening = [], True

    def listen(event: str, duration: float, **_) -> None:
        if listening and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    any_prompt, key = engine_lib.prompt_batch(engine, [[1]]), jax.random.key(0)
    generate.warm_up(engine, params, Request(any_prompt, key, 2, 12))
    warm = programs.compiled_programs()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        rng = np.random.default_rng(1)
        for step in range(12):
            batch = engine_lib.prompt_batch(engine, prompts(int(rng.integers(5, 40)), 8, step))
            request = Request(batch, jax.random.key(step), 2, int(rng.integers(1, 13)))
            generate.rollout(engine, params, request)
        assert programs.compiled_programs() == warm
        assert not compiled
        jax.jit(lambda x: x * 5 + 1)(np.arange(3))
        assert compiled, "the listener hears compilations"
    finally:
        listening = False


@functools.cache
def _free(count: int):
    """A queue of greedy rows that never end: (engine, params, request, their tokens [B, N])."""
    model = dataclasses.replace(MODEL, window=0, window_layers=())
    buckets = BucketConfig(prompt=(4,), completion=(7,))
    engine = Engine(None, model, (), GREEDY, buckets, rows=3)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(4), model)
    batch = engine_lib.prompt_batch(engine, prompts(count, 4))
    request = Request(batch, jax.random.key(0), 2, 7, ending=Ending(jnp.full(304, -1)))
    rollout = generate.rollout(dataclasses.replace(engine, rows=0), params, request)
    return engine, params, request, np.asarray(rollout.completions.tokens).reshape(-1, 7)


@settings(max_examples=25)
@given(ends=st.sets(st.integers(0, 303), max_size=150), until=st.integers(1, 7))
def test_rows_end_at_their_first_end_token_whatever_the_ends(ends, until):
    engine, params, request, free = _free(8)
    ending = Ending(jnp.asarray(np.resize([-1, *ends], 304), jnp.int32))
    request = request.replace(max_new_tokens=until, ending=ending)
    made = generate.rollout(engine, params, request).completions
    for row, tokens, length, over in zip(
        free,
        made.tokens.reshape(-1, 7),
        made.length.reshape(-1),
        made.finished.reshape(-1),
        strict=True,
    ):
        stops = [n for n in range(until) if row[n] in ends]
        assert length == (stops[0] + 1 if stops else until) and over == bool(stops)
        np.testing.assert_array_equal(tokens, np.where(np.arange(7) < length, row, 0))


def test_which_calls_wait(engine):
    few = dataclasses.replace(engine, rows=32)
    assert not refill.waits(engine, 1000, 8)
    assert not refill.waits(few, 16, 2) and refill.waits(few, 17, 2) and refill.waits(few, 3, 3)
    with pytest.raises(ValueError, match="^rows=-1: must be 0"):
        EngineConfig(rows=-1)
