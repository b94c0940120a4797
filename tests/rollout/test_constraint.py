"""Decoding under the chain's grammar: always a valid chain, drawn exactly from what is allowed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.stats

from gtalign_jax.chain.grammar import chain_grammar, run
from gtalign_jax.chain.parse import BLOCKS, parse_chain, payoff_array
from gtalign_jax.chain.prompt import format_chain, payoff_json
from gtalign_jax.errors import UserError
from gtalign_jax.models.transformer import forward, init_params, unembed
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generate, programs
from gtalign_jax.rollout import grammar as lifted
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.decode_state import Forced
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.grammar import BlockLimits, GrammarState
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.sampling import GREEDY, SamplingConfig, sample_token
from gtalign_jax.rollout.token_bytes import token_bytes
from gtalign_jax.serving.splice import read_payoff, splice_payoff
from tests.small import small_model

N, G = 96, 12
GRAMMAR = chain_grammar()
LIMITS = BlockLimits(thinking=9, payoff=24, analyze=7, response=8)


@pytest.fixture(scope="module")
def engine(tokenizer) -> Engine:
    config = small_model(len(tokenizer) + 3, num_layers=1)
    buckets = BucketConfig(prompt=(4,), completion=(N,), batch=(8,))
    return Engine(tokenizer, config, (tokenizer.eos_token_id,), buckets=buckets)


@pytest.fixture(scope="module")
def params(engine):
    return jax.jit(init_params, static_argnums=1)(jax.random.key(0), engine.model_config)


@pytest.fixture(scope="module")
def constraint(engine):
    return engine_lib.make_constraint(engine)


@pytest.fixture(scope="module")
def batch(engine):
    return engine_lib.prompt_batch(engine, [[5 + i] * (1 + i % 4) for i in range(8)])


@pytest.fixture(scope="module")
def oracle(engine):
    """(bytes of tokens, next state [states, V] with -1, fewest tokens to the end [states]), made anew."""
    texts = token_bytes(engine.tokenizer, engine.model_config.vocab_size)
    eos, states = engine.eos_ids[0], len(GRAMMAR.step)
    following = np.full((states, len(texts)), -1)
    for v, text in enumerate(texts):
        if text:
            following[:, v] = [run(GRAMMAR, text, s) for s in range(states)]
    following[following == GRAMMAR.dead] = -1
    rows, tokens = np.nonzero(following >= 0)
    edges = (np.ones(rows.size), (following[rows, tokens], rows))
    graph = scipy.sparse.coo_matrix(edges, (states, states)).tocsr()
    graph.data[:] = 1
    distance = scipy.sparse.csgraph.dijkstra(graph, indices=GRAMMAR.accept, unweighted=True) + 1
    return eos, following, distance


def _allowed(oracle, ids, left: int) -> np.ndarray:
    """bool [V] after the tokens ids when `left` may still be written, by its definition."""
    eos, following, distance = oracle
    state = 0
    for i in ids:
        state = following[state, i]
    after = np.where(following[state] >= 0, distance[following[state]], np.inf)
    after[eos] = 0 if state == GRAMMAR.accept else np.inf
    return after <= left - 1


def _rollout(engine, params, batch, seed, budget, constraint, group=G):
    """The completions of a step with this seed under the grammar."""
    request = Request(batch, jax.random.key(seed), group, budget, constraint=constraint)
    return generate.rollout(engine, params, request).completions


def _check(engine, made, count: int) -> list[str]:
    texts = engine_lib.texts(engine, made)
    assert len(texts) == count and np.asarray(made.finished).all()
    for text in texts:
        chain = parse_chain(text)
        assert chain.format_ok and chain.reward_ok and chain.errors == ()
        assert payoff_json(payoff_array(chain)[0]) == chain.payoff_text
    return texts


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=3, min_p=0.01), GREEDY])
def test_every_completion_of_a_random_model_is_a_valid_chain(engine, params, batch, constraint, sampling):
    """Three hundred rows, at the tightest budget and at looser ones, on one program."""
    engine = dataclasses.replace(engine, sampling=sampling)
    least = lifted.shortest(constraint)
    traced = None
    for budget in (least, least + 1, N):
        made = _rollout(engine, params, batch, 1, budget, constraint)
        texts = _check(engine, made, 96)
        assert np.asarray(made.length).max() <= budget
        assert np.isfinite(np.asarray(made.logp)).all()
        traced = traced or programs.compiled_programs()
        assert programs.compiled_programs() == traced
    if not sampling.greedy:
        assert len(set(texts)) == 96


def test_limits_give_each_block_its_room(engine, params, batch):
    constraint = engine_lib.make_constraint(engine, LIMITS)
    least = lifted.shortest(constraint)
    budget = least + sum(dataclasses.astuple(LIMITS))
    assert budget <= N
    made = _rollout(engine, params, batch, 2, budget, constraint)
    _check(engine, made, 96)
    _, before = lifted.replay(constraint._replace(budget=np.int32(budget)), made.tokens, made.length)
    block = np.asarray(constraint.block)[before.state]
    inside = np.arange(N) < np.asarray(made.length)[..., None]
    used = [((block == i) & inside).sum(-1) for i in range(len(BLOCKS))]
    for name, tokens in zip(BLOCKS, used, strict=True):
        assert tokens.max() <= getattr(LIMITS, name) + least
    # The first block does not eat what the last one may have.
    assert used[3].max() > 6 and used[0].max() <= LIMITS.thinking + 3


def test_log_probabilities_are_those_of_the_forward_pass_over_allowed_tokens(
    engine, params, batch, constraint, oracle
):
    budget = lifted.shortest(constraint) + 6
    made = jax.device_get(_rollout(engine, params, batch, 3, budget, constraint))
    for (p, g), n in np.ndenumerate(made.length[:, :2]):
        prompt, ids = batch.tokens[p, : batch.length[p]], made.tokens[p, g, :n]
        row = np.zeros((1, 4 + N), np.int32)
        row[0, : len(prompt) + n] = [*prompt, *ids]
        logits = np.asarray(_forward_logits(params, engine.model_config, row))[0, len(prompt) - 1 :]
        for t, v in enumerate(ids):
            z = np.where(_allowed(oracle, ids[:t], budget - t), logits[t].astype(np.float64), -np.inf)
            logp = z[v] - np.log(np.exp(z - z.max()).sum()) - z.max()
            np.testing.assert_allclose(made.logp[p, g, t], logp, atol=1e-5)
    _, before = lifted.replay(constraint._replace(budget=np.int32(budget)), made.tokens, made.length)
    flat = jnp.zeros((*made.tokens.shape, engine.model_config.vocab_size))
    uniform = jax.nn.log_softmax(lifted.masked_logits(constraint, before, flat))[0, 0]
    for t in range(made.length[0, 0]):
        allowed = _allowed(oracle, made.tokens[0, 0, :t], budget - t)
        np.testing.assert_array_equal(np.isfinite(uniform[t]), allowed)


@functools.partial(jax.jit, static_argnums=1)
def _forward_logits(params, config, row):
    return unembed(params, config, forward(params, config, row, jnp.asarray([row.shape[1]])))


def test_tables_are_the_byte_automaton_run_over_each_token(engine, constraint, oracle):
    eos, following, distance = oracle
    table = jax.device_get(constraint)
    live = np.arange(len(GRAMMAR.step)) != GRAMMAR.dead
    step = table.step[:-1][live][:, table.classes]
    expected = following[live].copy()
    expected[GRAMMAR.accept, eos] = len(GRAMMAR.step)
    np.testing.assert_array_equal(step, np.where(expected < 0, GRAMMAR.dead, expected))
    np.testing.assert_array_equal(table.distance[:-1][live], distance[live])


def test_a_tokenizer_of_single_bytes_writes_chains_too():
    """No model: uniform draws among the allowed tokens, 256 bytes and an end token."""
    constraint = lifted.compile_constraint(
        GRAMMAR, [bytes([b]) for b in range(256)] + [None], [256], BlockLimits(*(40,) * 4)
    )
    budget = lifted.shortest(constraint) + 160
    assert (
        lifted.shortest(constraint)
        == len(format_chain("", np.zeros((2, 3, 2)), "", "").replace("\n\n", "x")) + 1
    )
    constraint = jax.device_put(constraint._replace(budget=np.int32(budget)))

    def step(at, scanned):
        uniform, t = scanned
        logits = lifted.masked_logits(constraint, at, jnp.zeros((64, 257)))
        token, _ = sample_token(uniform, logits, SamplingConfig())
        return lifted.advanced(constraint, at, token, t), token

    uniform = jax.random.uniform(jax.random.key(0), (budget, 64))
    _, tokens = jax.jit(
        lambda u: jax.lax.scan(step, lifted.start_state(constraint, (64,)), (u, jnp.arange(budget)))
    )(uniform)
    for row in np.asarray(tokens).T:
        assert (row == 256).any()
        chain = parse_chain(bytes(row[: np.argmax(row == 256)].tolist()).decode())
        assert chain.format_ok and chain.reward_ok


def test_tokens_that_cannot_write_a_chain_are_refused():
    with pytest.raises(UserError, match="tokenizer: its tokens cannot write"):
        lifted.compile_constraint(GRAMMAR, [b"<", b"a", None], [2])
    with pytest.raises(ValueError, match="^analyze=-1: give 0 or more"):
        BlockLimits(analyze=-1)


def test_a_budget_too_small_for_a_chain_is_named(engine, params, batch, constraint):
    least = lifted.shortest(constraint)
    with pytest.raises(UserError, match=rf"max_new_tokens={least - 1}: the shortest chain takes {least}"):
        _rollout(engine, params, batch, 0, least - 1, constraint, group=1)


def test_frequencies_pass_a_chi_square_test(constraint):
    """With room for one more token of text, some are closed; the others keep their odds."""
    table = jax.device_get(constraint)
    state, n = run(GRAMMAR, b"<thinking>"), 20_000
    at = GrammarState(np.full(n, state, np.int32), np.full(n, table.distance[state] + 1, np.int32))
    logits = np.random.default_rng(0).normal(size=len(table.classes)).astype(np.float32)
    allowed = table.waste[state, table.classes] <= 1
    assert 1 < allowed.sum() < len(allowed)
    masked = lifted.masked_logits(constraint, at, jnp.broadcast_to(logits, (n, len(logits))))
    uniform = jax.random.uniform(jax.random.key(2), (n,))
    token, logp = sample_token(uniform, masked, SamplingConfig())
    p = np.where(allowed, np.exp(logits.astype(np.float64)), 0)
    p /= p.sum()
    count = np.bincount(np.asarray(token), minlength=len(p))
    assert not count[~allowed].any()
    kept = p * n >= 5
    observed, expected = (np.append(x[kept], x[~kept].sum()) for x in (count, p * n))
    assert scipy.stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3
    np.testing.assert_allclose(logp, np.log(p[np.asarray(token)]), atol=1e-5)


def test_compaction_keeps_the_grammar(engine, params, batch, constraint):
    one, two = (
        _rollout(e, params, batch, 5, N, constraint)
        for e in (engine, dataclasses.replace(engine, compact_every=16))
    )
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_array_equal(one.length, two.length)
    np.testing.assert_allclose(one.logp, two.logp, atol=1e-5)


def test_one_and_eight_devices_write_the_same(engine, params, batch, constraint):
    axes, auto = ("data", "fsdp", "tensor", "context"), (jax.sharding.AxisType.Auto,) * 4
    mesh = jax.make_mesh((2, 2, 2, 1), axes, axis_types=auto)
    spread = dataclasses.replace(engine, mesh=mesh)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    budget = lifted.shortest(constraint) + 4
    alone = _rollout(engine, params, batch, 6, budget, constraint)
    replicated, tables = jax.device_put(params, everywhere), engine_lib.make_constraint(spread)
    result = _rollout(spread, replicated, batch, 6, budget, tables)
    np.testing.assert_array_equal(alone.tokens, result.tokens)


def test_a_sequence_cut_edited_and_resumed_stays_a_chain(engine, params, constraint):
    """Steering's own steps: stop at </payoff>, put another matrix in, go on from the cache."""
    engine = dataclasses.replace(engine, buckets=dataclasses.replace(engine.buckets, batch=(1,)))
    batch = engine_lib.prompt_batch(engine, [[5, 6]])
    limited = engine_lib.make_constraint(engine, LIMITS)
    stop = engine_lib.make_ending(engine, ["</payoff>"])
    matrix = np.linspace(-5, 5, 12).round(1).reshape(2, 3, 2)
    request = Request(batch, jax.random.key(7), 1, N, ending=stop, constraint=limited)
    state = generate.begin(engine, params, request)
    written = engine_lib.completion_ids(state.completions)[0]
    text = engine_lib.decode_tokens(engine, written)
    assert text.endswith("</payoff>") and read_payoff(text).shape == (2, 3, 2)
    splice = splice_payoff(engine, written, matrix)
    tokens = np.zeros((1, 1, N), np.int32)
    tokens[..., : len(splice.prefix)] = splice.prefix
    forced = Forced(tokens, np.full((1, 1), len(splice.prefix), np.int32))
    to_the_end = request.replace(ending=engine_lib.make_ending(engine))
    state = generate.resume(engine, params, state, forced, splice.kept, to_the_end)
    made = state.completions
    chain = parse_chain(engine_lib.texts(engine, made)[0])
    assert chain.format_ok and made.finished.all()
    np.testing.assert_array_equal(payoff_array(chain)[0], matrix)
    after, _ = lifted.replay(limited._replace(budget=np.int32(N)), made.tokens, made.length)
    jax.tree.map(np.testing.assert_array_equal, after, state.grammar)


def test_a_forced_token_outside_the_grammar_sets_the_row_free(constraint):
    table = jax.device_get(constraint)
    wrong = int(np.flatnonzero(table.waste[0, table.classes] == 255)[0])
    begin = lifted.start_state(constraint._replace(budget=np.int32(50)), (1,))
    free = lifted.advanced(constraint, begin, jnp.asarray([wrong]), jnp.int32(0))
    logits = jnp.zeros((1, len(table.classes)))
    np.testing.assert_array_equal(lifted.masked_logits(constraint, free, logits), logits)
