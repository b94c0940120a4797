"""What a real vLLM answers, beside our own engine: tokens, log-probabilities, ends, and pushed weights.

All of it for tied embeddings, on a server that was started elsewhere than where weights are handed over, and
for untied ones, on a server that was started there.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import generate as generate_job
from gtalign_jax import jsonl
from gtalign_jax.chain.grammar import BYTES, Grammar
from gtalign_jax.errors import UserError
from gtalign_jax.models.transformer import forward, unembed
from gtalign_jax.remote.pool import Failed, post_all
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import external, generate, grammar, servers
from gtalign_jax.rollout.backends import completion_call, reload_calls, unknown_way
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.folder import EngineOptions, load_engine
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.sampling import GREEDY, SamplingConfig, processed_logits
from gtalign_jax.rollout.servers import ServerConfig
from gtalign_jax.rollout.token_bytes import token_bytes
from gtalign_jax.types import Completions, Rollout

N, G = 24, 3
SLOTS = 8
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [40]]
KEY = jax.random.key(3)
ATOL = 5e-5  # float32, summed in another order

FILTERS = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 1.5},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "top_k and top_p": {"top_k": 8, "top_p": 0.8},
    "top_k and min_p": {"top_k": 8, "min_p": 0.02, "temperature": 1.5},
    "repetition": {"repetition_penalty": 1.3, "temperature": 0.7, "top_k": 9},
}


@pytest.fixture(scope="module", params=["tied, started elsewhere", "untied, started from the run's folder"])
def served(request, serve, write_model, tmp_path_factory):
    """(server's URL, folder of the start model, folder where weights are handed over)."""
    tied, work = request.param.startswith("tied"), tmp_path_factory.mktemp("work")
    start = write_model(work / ("start" if tied else "engine"), tied)
    server = serve(start)
    yield server.url, start, work / "engine"
    server.kill()


@pytest.fixture(scope="module")
def loaded(served):
    options = EngineOptions(buckets=BucketConfig(prompt=(SLOTS,), completion=(N,), batch=(len(PROMPTS),)))
    return load_engine(str(served[1]), options)


@pytest.fixture(scope="module")
def engine(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def params(loaded):
    return loaded[1]


@pytest.fixture(scope="module")
def server(served):
    return servers.connect(ServerConfig(kind="vllm", endpoints=(served[0],), model="policy"))


@pytest.fixture(scope="module")
def batch(engine):
    return engine_lib.prompt_batch(engine, PROMPTS)


def sampling_as(engine, **fields):
    return dataclasses.replace(engine, sampling=SamplingConfig(**fields))


def logits_of(engine, params, rollout: Rollout) -> tuple[jax.Array, jax.Array]:
    """(logits [P, G, N, V] that predict each token, which tokens were there before it [P, G, N, V] bool)."""
    prompts, written = rollout.prompts, rollout.completions.tokens
    rows = np.zeros((*written.shape[:2], SLOTS + N), np.int32)
    for p, length in enumerate(prompts.length):
        rows[p, :, :length] = prompts.tokens[p, :length]
        rows[p, :, length : length + N] = written[p]
    flat = jnp.asarray(rows.reshape(-1, SLOTS + N))

    @jax.jit
    def read(params, tokens):
        hidden = forward(params, engine.model_config, tokens, jnp.full(len(tokens), SLOTS + N))
        return unembed(params, engine.model_config, hidden)

    logits = read(params, flat).reshape(*rows.shape, -1)
    seen = np.maximum.accumulate(np.eye(logits.shape[-1], dtype=bool)[rows], axis=2)
    at = [slice(length - 1, length - 1 + N) for length in prompts.length]
    picked = [[np.stack([x[p, :, cut] for p, cut in enumerate(at)])] for x in (np.asarray(logits), seen)]
    return jnp.asarray(picked[0][0]), jnp.asarray(picked[1][0])


def worst(logits: jax.Array, completions: Completions) -> float:
    """How far the log-probabilities of a rollout are from these of the same tokens."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    logp = jnp.take_along_axis(logp, jnp.asarray(completions.tokens)[..., None], axis=-1)[..., 0]
    return float(jnp.abs(jnp.where(completions.action_mask, logp - completions.logp, 0.0)).max())


def test_greedy_groups_are_those_of_the_engine(server, engine, params, batch, showed):
    greedy = dataclasses.replace(engine, sampling=GREEDY)
    got = external.rollout(server, greedy, None, Request(batch, KEY, 2, N)).completions
    want = jax.device_get(generate.rollout(greedy, params, Request(batch, KEY, 2, N))).completions
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.finished, want.finished)
    np.testing.assert_allclose(got.logp, want.logp, atol=ATOL)
    showed(f"the same tokens, log-probabilities within {np.abs(got.logp - want.logp).max():.1e}")


@pytest.mark.parametrize("name", FILTERS)
def test_log_probabilities_are_those_of_the_distribution_of_the_engine(
    server, engine, params, batch, name, showed
):
    asked = sampling_as(engine, **FILTERS[name])
    rollout = external.rollout(server, asked, None, Request(batch, KEY, G, N))
    logits, seen = logits_of(engine, params, rollout)
    written = rollout.completions
    off = worst(processed_logits(logits, asked.sampling, seen), written)
    assert off < ATOL
    assert worst(logits, written) > 0.05  # which would be seen to be another
    showed(f"within {off:.1e}")
    assert len({tuple(row) for row in written.tokens.reshape(-1, N)}) == len(PROMPTS) * G


def test_samples_are_drawn_as_often_as_the_engine_says(server, engine, params, batch, showed):
    """The first token of 600 samples: total variation from the softmax at the temperature."""
    warm = sampling_as(engine, temperature=0.8)
    first = jax.tree.map(lambda x: x[:1], batch)
    rollout = external.rollout(server, warm, None, Request(first, KEY, 600, N))
    part = jax.tree.map(lambda x: x[:, :1], rollout.completions)
    logits, _ = logits_of(engine, params, Rollout(rollout.prompts, part))
    p = np.asarray(jax.nn.softmax(logits[0, 0, 0] / 0.8))
    drawn = np.bincount(rollout.completions.tokens[0, :, 0], minlength=len(p)) / 600
    rng = np.random.default_rng(0)
    usual = [np.abs(rng.multinomial(600, p / p.sum()) / 600 - p).sum() / 2 for _ in range(200)]
    distance = np.abs(drawn - p).sum() / 2
    assert distance < max(usual)
    showed(f"total variation {distance:.3f}, where 200 exact draws of 600 have up to {max(usual):.3f}")


def test_min_p_beside_top_p_is_another_distribution_there(server, engine, params, batch, showed):
    """Why it is refused at the start: vLLM applies min-p first."""
    mixed = sampling_as(engine, top_p=0.8, min_p=0.05, temperature=1.5)
    request = Request(batch, KEY, G, N)
    with pytest.raises(UserError, match=r"sampling.min_p=0.05: vLLM applies it before top_p"):
        external.rollout(server, mixed, None, request)
    terms = external._terms(server, mixed, request, None)
    rows = external._completions(server, terms, batch, external._seeds(request), True)
    rollout = external._to_rollout(mixed, request, None, rows)
    logits, seen = logits_of(engine, params, rollout)
    off = worst(processed_logits(logits, mixed.sampling, seen), rollout.completions)
    assert off > 0.01
    showed(f"apart by up to {off:.2f} nats")


def test_a_group_is_as_many_samples_of_the_next_seeds(server, engine, batch):
    request = Request(batch, KEY, G, N)
    whole = external.rollout(server, engine, None, request).completions
    again = external.rollout(server, engine, None, request).completions
    seeds = external._seeds(request)
    single = external.rollout(server, engine, None, request.replace(seeds=seeds)).completions
    for other in (again, single):
        np.testing.assert_array_equal(whole.tokens, other.tokens)
        np.testing.assert_allclose(whole.logp, other.logp, atol=ATOL)


def test_rows_end_at_stop_strings_as_those_of_the_engine(server, engine, params, batch):
    greedy = dataclasses.replace(engine, sampling=GREEDY)
    free = jax.device_get(generate.rollout(greedy, params, Request(batch, KEY, 1, N)))
    stop = engine_lib.decode_tokens(engine, free.completions.tokens[0, 0, 4:6])
    ending = engine_lib.make_ending(engine, [stop])
    request = Request(batch, KEY, 1, N, ending=ending, stops=(stop,))
    want = jax.device_get(generate.rollout(greedy, params, request)).completions
    got = external.rollout(server, greedy, None, Request(batch, KEY, 1, N, stops=(stop,))).completions
    for name in ("tokens", "length", "finished", "action_mask"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    np.testing.assert_allclose(got.logp, want.logp, atol=ATOL)
    assert got.length[0, 0] <= 6 and got.finished[0, 0] and (got.length > 6).any()


def test_structured_outputs_are_scored_under_their_constraint(server, engine, params, batch, showed):
    """`processed_logprobs` are renormalised over the tokens that the constraint leaves open."""
    texts = [f"{word} {i}.{half}" for word in ("the", "a question") for i in range(10) for half in (0, 5)]
    vocab, eos = engine.model_config.vocab_size, engine.eos_ids
    tables = grammar.compile_constraint(trie(texts), token_bytes(engine.tokenizer, vocab), eos)
    request = Request(batch, KEY, G, N)
    terms = external._terms(server, engine, request, None)
    calls = [completion_call(terms, ids, G, 7 + i) for i, ids in enumerate(PROMPTS)]
    choice = {"structured_outputs": {"choice": texts}}
    answers = post_all(server.pool, [dataclasses.replace(c, body={**c.body, **choice}) for c in calls])
    rollout = external._to_rollout(engine, request, None, sum(answers, []))
    written = rollout.completions
    assert written.finished.all() and {*engine_lib.texts(engine, written)} <= {*texts}
    logits, _ = logits_of(engine, params, rollout)
    states = grammar.action_states(tables, written)
    off = worst(grammar.limited_logits(tables, states, logits), written)
    assert off < ATOL and worst(logits, written) > 0.05
    showed(f"within {off:.1e}")


def trie(texts: list[str]) -> Grammar:
    """The automaton of these texts and no other."""
    edges, states = {}, {b"": 0}
    for text in (text.encode() for text in texts):
        for end in range(1, len(text)):
            states.setdefault(text[:end], len(states))
    accept, dead = len(states), len(states) + 1
    for text in (text.encode() for text in texts):
        for end in range(1, len(text) + 1):
            edges[states[text[: end - 1]], text[end - 1]] = states.get(text[:end], accept)
    step = np.full((dead + 1, BYTES), dead, np.int32)
    for (state, byte), target in edges.items():
        step[state, byte] = target
    return Grammar(step, np.zeros(dead + 1, np.int32), 0, accept, dead)


def test_the_command_line_writes_the_same_lines_from_a_server(served, tmp_path):
    """`experiments.generate`, greedy, with and without --server."""
    url, start, _ = served
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Where is the map?"}\n{"token_ids": [8, 9], "id": "b"}\n')
    common = [f"--model={start}", f"--prompts={prompts}", "--n=2", "--temperature=0", "--max_new_tokens=16"]
    by = {"engine": [], "server": [f"--server={url}", "--served_model=policy"]}
    lines = {}
    for who, flags in by.items():
        generate_job.main([*common, f"--out={tmp_path / who}", "--logprobs", *flags])
        lines[who] = jsonl.read(tmp_path / who)
    for ours, theirs in zip(lines["engine"], lines["server"], strict=True):
        np.testing.assert_allclose(ours.pop("logprobs"), theirs.pop("logprobs"), atol=ATOL)
    assert lines["engine"] == lines["server"] and len(lines["engine"]) == 4


def test_a_server_without_room_for_the_completion_is_named(server, engine):
    """vLLM answers such a request with fewer tokens, as if it had been asked for them."""
    wide = dataclasses.replace(engine, buckets=BucketConfig(prompt=(512,), completion=(N,), batch=(1,)))
    prompt = engine_lib.prompt_batch(wide, [[7] * 500])
    with pytest.raises(UserError, match=r"stopped after 1\d of 24 tokens: .*--max-model-len"):
        external.rollout(server, wide, None, Request(prompt, KEY, 1, N))


def test_what_a_server_says_of_weights_that_it_cannot_load(server, tmp_path):
    """A path that it does not see is one thing, a way to load that it does not know another."""
    (by_path, _), _ = reload_calls("vllm", str(tmp_path / "nowhere"))
    other = dataclasses.replace(by_path, body={**by_path.body, "kwargs": {"weights_from": "nowhere"}})
    unseen, unknown = post_all(server.pool, [by_path, other])
    assert isinstance(unseen, Failed) and not unknown_way(unseen)
    assert isinstance(unknown, Failed) and unknown_way(unknown)


def test_a_push_is_seen_to_arrive(served, server, engine, params, batch, caplog, showed):
    """Of other weights, of those again, and of the first ones."""
    folder, greedy = served[2], dataclasses.replace(engine, sampling=GREEDY)
    moved = jax.tree.map(lambda x: x * 1.1 + 0.02 * jax.random.normal(KEY, x.shape), params)
    off = []
    for weights in (params, moved, moved, params):
        assert external.push_weights(server, weights, greedy, folder) == 1
        got = external.rollout(server, greedy, None, Request(batch, KEY, 1, N)).completions
        want = jax.device_get(generate.rollout(greedy, weights, Request(batch, KEY, 1, N))).completions
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_allclose(got.logp, want.logp, atol=2 * ATOL)
        off.append(np.abs(got.logp - want.logp).max())
    showed(f"four pushes, the tokens of the new weights, log-probabilities within {max(off):.1e}")
    assert "unmoved" not in server.pool.numbers() and not caplog.records
