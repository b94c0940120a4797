"""The host side: text, buckets, meshes and the count of compiled programs."""

import copy
import dataclasses
import itertools

import jax
import numpy as np
import pytest

from gtalign_jax.errors import UserError
from gtalign_jax.learning.logprobs import token_logprobs
from gtalign_jax.learning.vocabulary import Head
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh
from gtalign_jax.models.transformer import forward, init_params, unembed
from gtalign_jax.rollout import compaction, generate, programs
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.sampling import GREEDY, SamplingConfig
from tests.small import small_model

BUCKETS = BucketConfig(prompt=(8, 16), completion=(6, 12), batch=(8,))
MODEL = small_model(304, num_layers=1)


@pytest.fixture(scope="module")
def engine(tokenizer) -> Engine:
    return Engine(tokenizer, MODEL, (tokenizer.eos_token_id,), buckets=BUCKETS)


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=1)(jax.random.key(0), MODEL)


def _prompts(count: int, longest: int = 8, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 300, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def test_chat_messages_go_through_the_template_and_text_comes_back(engine):
    ids = engine_lib.encode(engine, [{"role": "user", "content": "the question é"}])
    text = engine.tokenizer.decode(ids)
    assert text == "<|im_start|>user\nthe question é<|im_end|>\n<|im_start|>assistant\n"
    plain = engine_lib.encode(engine, "a clear payoff")
    eos = engine.eos_ids[0]
    assert engine_lib.decode_tokens(engine, [*plain, eos]) == "a clear payoff"
    assert engine_lib.decode_tokens(engine, [eos, *plain]) == "<|im_end|>a clear payoff"


def test_messages_the_tokenizer_cannot_render_are_refused(engine):
    messages = [{"role": "user", "content": "x"}]
    bare, strict = copy.copy(engine.tokenizer), copy.copy(engine.tokenizer)
    bare.chat_template = None
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    for tokenizer, message in ((bare, "no chat template"), (strict, "roles must alternate")):
        with pytest.raises(UserError, match=message):
            engine_lib.encode(dataclasses.replace(engine, tokenizer=tokenizer), messages)


def test_texts_are_in_row_order_and_end_at_their_length(engine, params):
    batch = engine_lib.prompt_batch(engine, _prompts(2))
    made = generate.rollout(engine, params, Request(batch, jax.random.key(0), 2, 12)).completions
    texts = engine_lib.texts(engine, made)
    assert len(texts) == 4
    row = np.asarray(made.tokens[1, 0, : made.length[1, 0]])
    assert texts[2] == engine_lib.decode_tokens(engine, row)


def test_prompts_are_padded_to_their_bucket(engine):
    batch = engine_lib.prompt_batch(engine, [[1, 2, 3], [4] * 9])
    assert batch.tokens.shape == (2, 16) and batch.tokens.dtype == np.int32
    np.testing.assert_array_equal(batch.length, [3, 9])
    assert engine_lib.fits(engine, [1] * 16) and not engine_lib.fits(engine, [1] * 17)
    assert not engine_lib.fits(engine, [])


def test_what_does_not_fit_is_named(engine, params):
    with pytest.raises(UserError, match=r"prompt 1 needs 17 slots.*buckets\.prompt"):
        engine_lib.prompt_batch(engine, [[1], [1] * 17])
    with pytest.raises(UserError, match="prompt 0 has no tokens"):
        engine_lib.prompt_batch(engine, [[]])
    batch = engine_lib.prompt_batch(engine, [[1]])
    with pytest.raises(UserError, match=r"max_new_tokens needs 13 slots.*buckets\.completion"):
        generate.rollout(engine, params, Request(batch, jax.random.key(0), 1, 13))
    with pytest.raises(ValueError, match=r"^prompt=\(8, 4\): give positive sizes, increasing"):
        BucketConfig(prompt=(8, 4))


def test_padding_prompts_and_parts_of_a_step_do_not_change_the_tokens(engine, params):
    prompts, key = _prompts(5), jax.random.key(3)
    request = Request(engine_lib.prompt_batch(engine, prompts), key, 2, 12)
    whole = generate.rollout(engine, params, request).completions.tokens
    assert whole.shape == (5, 2, 12)
    part = request.replace(prompts=engine_lib.prompt_batch(engine, prompts[3:]), first_row=3)
    np.testing.assert_array_equal(whole[3:], generate.rollout(engine, params, part).completions.tokens)


def test_one_and_eight_devices_write_the_same(engine, params):
    axes = ("data", "fsdp", "tensor", "context")
    auto = (jax.sharding.AxisType.Auto,) * 4
    request = Request(engine_lib.prompt_batch(engine, _prompts(7)), jax.random.key(4), 2, 12)
    alone = generate.rollout(engine, params, request).completions
    for shape in ((8, 1, 1, 1), (2, 2, 2, 1)):
        mesh = jax.make_mesh(shape, axes, axis_types=auto)
        replicated = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        spread = dataclasses.replace(engine, mesh=mesh)
        result = generate.rollout(spread, replicated, request).completions
        np.testing.assert_array_equal(alone.tokens, result.tokens)
        np.testing.assert_allclose(alone.logp, result.logp, atol=1e-5)


@pytest.mark.parametrize("compact_every", [0, 2])
def test_nothing_compiles_after_warm_up(engine, params, compact_every):
    """Fifty batches of mixed counts, lengths and budgets run on the programs of the buckets alone."""
    group_size = 1
    if compact_every:
        buckets, group_size = dataclasses.replace(BUCKETS, prompt=(16,), completion=(12,)), 2
        engine = dataclasses.replace(engine, buckets=buckets, eos_ids=tuple(range(0, 304, 4)))
    engine = dataclasses.replace(engine, compact_every=compact_every)
    compiled = []
    listening = True

    def listen(event: str, duration: float, **_) -> None:
        if listening and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def run(count: int, longest: int, budget: int, seed: int) -> None:
        prompts = _prompts(count, longest, seed)
        prompts[0] = [1] * longest
        batch = engine_lib.prompt_batch(engine, prompts)
        request = Request(batch, jax.random.key(seed), group_size, budget)
        made = generate.rollout(engine, params, request).completions
        assert len(engine_lib.texts(engine, made)) == count * group_size

    any_prompt, key = engine_lib.prompt_batch(engine, [[1]]), jax.random.key(0)
    for budget in engine.buckets.completion:
        generate.warm_up(engine, params, Request(any_prompt, key, group_size, budget))
    warm = programs.compiled_programs()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        rng = np.random.default_rng(1)
        for step in range(50):
            run(int(rng.integers(1, 9)), int(rng.integers(1, 17)), int(rng.integers(1, 13)), step)
        assert programs.compiled_programs() == warm
        assert not compiled
        jax.jit(lambda x: x * 3 + 1)(np.arange(3))
        assert compiled, "the listener hears compilations"
    finally:
        listening = False


def test_a_stop_string_ends_rows_at_the_token_that_completes_it(engine, params):
    request = Request(engine_lib.prompt_batch(engine, _prompts(8)), jax.random.key(6), 2, 12)
    free = generate.rollout(engine, params, request).completions
    stop = engine_lib.decode_tokens(engine, free.tokens[0, 0, 3:5])[:3]
    ending = engine_lib.make_ending(engine, [stop])
    stopped = generate.rollout(engine, params, request.replace(ending=ending)).completions
    named = generate.rollout(engine, params, request.replace(stops=(stop,))).completions
    jax.tree.map(np.testing.assert_array_equal, stopped, named)
    assert stopped.finished[0, 0] and stopped.length[0, 0] <= 5
    for before, after in zip(
        engine_lib.completion_ids(free), engine_lib.completion_ids(stopped), strict=True
    ):
        pieces = [engine_lib.decode_tokens(engine, before[: n + 1]) for n in range(len(before))]
        ends = [n + 1 for n, text in enumerate(pieces) if stop in text]
        np.testing.assert_array_equal(after, before[: ends[0] if ends else len(before)])


def test_compaction_changes_nothing_but_the_work(engine, params):
    """Rows end at different steps; the live ones move to smaller batches and draw what they would."""
    batch, key = engine_lib.prompt_batch(engine, _prompts(7)), jax.random.key(8)
    compact = dataclasses.replace(engine, compact_every=2)
    ending = engine_lib.make_ending(engine, ["e"])
    request = Request(batch, key, 2, 12, ending=ending._replace(eos=np.arange(0, 304, 4)))
    one, two = (generate.rollout(e, params, request) for e in (engine, compact))
    jax.tree.map(np.testing.assert_array_equal, one.prompts, two.prompts)
    one, two = one.completions, two.completions
    for name in ("tokens", "length", "finished", "action_mask"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    np.testing.assert_allclose(one.logp, two.logp, atol=1e-5)
    assert len(set(np.asarray(one.length).ravel().tolist())) > 3
    assert programs.compiled_programs()["take_rows"]


@jax.jit
def _argmax(params, tokens, length):
    return unembed(params, MODEL, forward(params, MODEL, tokens, length)).argmax(-1)


def _teacher_forced(params, rollout) -> list[list[int]]:
    """What the model finds likeliest after each token of each row, from whole rows without a cache."""
    prompts, made = rollout.prompts, rollout.completions
    tokens = np.zeros((made.length.size, BUCKETS.prompt[-1] + BUCKETS.completion[-1]), np.int32)
    rows = engine_lib.completion_ids(made)
    starts = np.repeat(np.asarray(prompts.length), made.length.shape[1])
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        prompt = np.asarray(prompts.tokens[i // made.length.shape[1], :start])
        tokens[i, : start + len(row)] = [*prompt, *row]
    likeliest = np.asarray(_argmax(params, tokens, starts + [len(row) for row in rows]))
    spans = zip(likeliest, starts, rows, strict=True)
    return [after[start - 1 : start - 1 + len(row)].tolist() for after, start, row in spans]


@pytest.mark.parametrize("compact_every", [0, 2], ids=["whole", "compacted"])
@pytest.mark.parametrize("mesh", [None, MeshConfig(data=4, tensor=2)], ids=["one", "eight"])
def test_greedy_tokens_are_the_teacher_forced_argmax_in_every_bucket(engine, params, mesh, compact_every):
    """Ragged prompts, rows that end at any step: the cache, its buckets and its moves change no token."""
    ends = tuple(range(0, 304, 8))
    if mesh is not None:
        mesh = make_mesh(mesh)
        params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    options = {"sampling": GREEDY, "eos_ids": ends, "compact_every": compact_every, "mesh": mesh}
    engine = dataclasses.replace(engine, **options)
    lengths = set()
    pairs = itertools.product(BUCKETS.prompt, BUCKETS.completion)
    if mesh is not None:  # compiling is all the cost: each bucket once
        pairs = zip(BUCKETS.prompt, BUCKETS.completion, strict=True)
    for slots, budget in pairs:
        prompts = _prompts(7, slots, seed=slots + budget)
        prompts[0] = [1] * slots
        request = Request(engine_lib.prompt_batch(engine, prompts), jax.random.key(0), 2, budget)
        rollout = jax.device_get(generate.rollout(engine, params, request))
        made = rollout.completions
        assert rollout.prompts.tokens.shape == (7, slots) and made.tokens.shape == (7, 2, budget)
        rows = [row.tolist() for row in engine_lib.completion_ids(made)]
        assert rows == _teacher_forced(jax.device_get(params), rollout)
        for row, finished in zip(rows, made.finished.reshape(-1), strict=True):
            assert not set(row[:-1]) & set(ends) and finished == (row[-1] in ends)
            assert finished or len(row) == budget
        lengths |= {len(row) for row in rows}
    assert len(lengths) > 4


def test_sampler_logprobs_are_the_trainers(engine, params):
    """At a temperature, on ragged prompts, rows of any length and moves between batches."""
    sampling = SamplingConfig(temperature=0.8)
    engine = dataclasses.replace(engine, sampling=sampling, eos_ids=tuple(range(0, 304, 8)), compact_every=2)
    batch = engine_lib.prompt_batch(engine, _prompts(7, 16))
    rollout = generate.rollout(engine, params, Request(batch, jax.random.key(2), 2, 12))
    prompts, made = rollout.prompts, rollout.completions
    trainer = jax.jit(token_logprobs, static_argnums=(1, 4))
    scored, _ = trainer(params, MODEL, prompts, made.tokens, Head(sampling.temperature))
    logp = np.where(made.action_mask, scored, 0.0)
    np.testing.assert_allclose(made.logp, logp, atol=1e-5, rtol=0)
    assert len(set(np.asarray(made.length).ravel().tolist())) > 3


def test_compaction_sizes_shrink_in_multiples_of_the_shards():
    assert compaction.batch_sizes(128, 1) == (128, 64, 16, 4, 1)
    assert compaction.batch_sizes(64, 8) == (64, 32, 8)
    assert compaction.batch_sizes(3, 1) == (3, 1)
    assert compaction.batch_sizes(1, 1) == (1,)


def test_a_seed_decides_what_a_sample_draws_wherever_it_stands(engine, params):
    prompts, key = _prompts(3), jax.random.key(9)
    seeds = np.array([[5, 7], [7, 7], [1, 5]])

    def drawn(order: list[int]) -> list[list[list[int]]]:
        batch = engine_lib.prompt_batch(engine, [prompts[i] for i in order])
        request = Request(batch, key, 2, 12, seeds=seeds[order])
        return generate.rollout(engine, params, request).completions.tokens.tolist()

    straight, turned = drawn([0, 1, 2]), drawn([2, 0, 1])
    assert [turned[1], turned[2], turned[0]] == straight
    assert straight[1][0] == straight[1][1] and straight[0][0] != straight[0][1]
    batch = engine_lib.prompt_batch(engine, prompts)
    with pytest.raises(UserError, match=r"seeds: shape \(2,\), needs \(3, 2\)"):
        generate.rollout(engine, params, Request(batch, key, 2, 12, seeds=np.arange(2)))


def test_greedy_needs_no_key(engine, params):
    greedy = dataclasses.replace(engine, sampling=GREEDY)
    batch = engine_lib.prompt_batch(greedy, _prompts(2))
    one, two = (
        generate.rollout(greedy, params, Request(batch, jax.random.key(seed), 2, 12)).completions.tokens
        for seed in (0, 1)
    )
    np.testing.assert_array_equal(one, two)
