"""The trainer's distributions under top-k, top-p and min-p are those that tokens were drawn from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.learning.experience import make_experience
from gtalign_jax.learning.learner import Learner
from gtalign_jax.learning.logprobs import token_logprobs
from gtalign_jax.learning.spec import Spec
from gtalign_jax.learning.state import init_model, init_state
from gtalign_jax.learning.step_losses import policy_step_loss
from gtalign_jax.learning.update import Optimizers
from gtalign_jax.learning.vocabulary import Head
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, place_batch, shard_tree
from gtalign_jax.models.config import ModelConfig, RuntimeConfig
from gtalign_jax.models.transformer import forward_shared, init_params, logical_axes, unembed
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generate, grammar
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.generator import limit_of
from gtalign_jax.rollout.grammar import BlockLimits
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.sampling import FAR_BELOW, SamplingConfig, filtered_logits
from gtalign_jax.types import Batch, Models

N, G = 40, 2
ALGORITHM = AlgorithmConfig(kl_coef=0.1, is_cap=2.0, minibatches=2, scale="none")
FILTERS = {
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
}


@pytest.fixture(scope="module")
def engine(tokenizer) -> Engine:
    config = ModelConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,  # which the tensor axis divides
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        initializer_range=0.3,
        runtime=RuntimeConfig(scan_layers=False),
    )
    buckets = BucketConfig(prompt=(4,), completion=(N,), batch=(4,))
    return Engine(tokenizer, config, (tokenizer.eos_token_id,), SamplingConfig(temperature=0.8), buckets)


@pytest.fixture(scope="module")
def params(engine):
    return jax.jit(init_params, static_argnums=1)(jax.random.key(0), engine.model_config)


@pytest.fixture(scope="module", params=FILTERS.values(), ids=FILTERS)
def filtered(engine, request) -> Engine:
    """The engine with one of the filters."""
    return dataclasses.replace(engine, sampling=dataclasses.replace(engine.sampling, **request.param))


def drawn(engine, params, constraint=None, budget=N):
    """A rollout of four prompts; two tokens of one row count as forced, as steering's are."""
    batch = engine_lib.prompt_batch(engine, [[5], [6, 7], [8, 9, 10], [11]])
    asked = Request(batch, jax.random.key(1), G, budget, constraint=constraint)
    rollout = generate.rollout(engine, params, asked)
    written = rollout.completions
    written = written.replace(action_mask=written.action_mask.at[1, 0, 3:5].set(False))
    return rollout.replace(completions=written)


@pytest.fixture(scope="module")
def rollout(filtered, params):
    return drawn(filtered, params)


def scored(params, rollout, engine, limit, chunk=1024):
    at = None if limit is None else limit.states(rollout.completions)
    head = Head(engine.sampling.temperature, chunk, limit and limit.logits)
    return token_logprobs(params, engine.model_config, rollout.prompts, rollout.completions.tokens, head, at)


def test_the_trainer_computes_the_samplers_logprobs(filtered, params, rollout):
    limit = limit_of(None, filtered.sampling, N)
    logp, entropy = jax.jit(lambda p: scored(p, rollout, filtered, limit, chunk=77))(params)
    free, _ = jax.jit(lambda p: scored(p, rollout, filtered, None))(params)
    mask, sampled = np.asarray(rollout.completions.action_mask), rollout.completions.logp
    assert np.isfinite(logp).all() and np.isfinite(entropy).all()
    np.testing.assert_allclose(logp[mask], sampled[mask], atol=1e-5)
    assert np.abs(free[mask] - sampled[mask]).mean() > 0.05  # the filter matters here
    np.testing.assert_allclose(logp[~mask], free[~mask], atol=1e-5)  # what was not drawn is not filtered


def test_the_update_starts_at_a_ratio_of_one(filtered, params, rollout):
    batch = Batch(rollout, jnp.arange(8, dtype=jnp.float32).reshape(4, 2), jnp.ones((4, 2), bool))

    def first(limit):
        spec = Spec(filtered.model_config, ALGORITHM, filtered.sampling.temperature, limit)

        @jax.jit
        def run(p):
            made = make_experience(spec, Models(p, p), batch)
            _, metrics = policy_step_loss(p, made, spec=spec)
            return made.is_weight, {name: m.value for name, m in metrics.items()}

        return run(params)

    weight, metrics = first(limit_of(None, filtered.sampling, N))
    assert metrics["sampler/gap"] < 1e-5 and metrics["kl/ref"] < 1e-6 and metrics["kl/old"] < 1e-6
    np.testing.assert_allclose(weight[rollout.completions.action_mask], 1.0, atol=1e-4)
    assert first(None)[1]["sampler/gap"] > 0.05


def test_gradients_are_those_of_whole_logits(filtered, params, rollout):
    written, limit = rollout.completions, limit_of(None, filtered.sampling, N)
    weight = jax.random.normal(jax.random.key(2), (2, *written.tokens.shape)) * written.action_mask

    def dense(params):
        hidden = forward_shared(
            params, filtered.model_config, rollout.prompts.tokens, rollout.prompts.length, written.tokens
        )
        logits = unembed(params, filtered.model_config, hidden) / filtered.sampling.temperature
        kept = limit.logits(limit.states(written), jax.lax.stop_gradient(logits)) > FAR_BELOW
        logp = jax.nn.log_softmax(jnp.where(kept, logits, -1e9))
        entropy = -jnp.sum(jnp.where(kept, jnp.exp(logp) * logp, 0.0), axis=-1)
        return jnp.take_along_axis(logp, written.tokens[..., None], axis=-1)[..., 0], entropy

    def loss(score):
        return lambda p: sum(jnp.sum(w * x) for w, x in zip(weight, score(p), strict=True))

    ours = loss(lambda p: scored(p, rollout, filtered, limit, chunk=50))
    got, want = (jax.jit(jax.value_and_grad(f))(params) for f in (ours, loss(dense)))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want[1]))
    for a, b in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)


def test_micro_batches_and_a_split_vocabulary_change_nothing(engine, params):
    """The same update whole, in micro-batches, and with the vocabulary and the batch over eight devices."""
    engine = dataclasses.replace(engine, sampling=SamplingConfig(temperature=0.8, **FILTERS["all"]))
    rollout, limit = drawn(engine, params), limit_of(None, engine.sampling, N)
    reward = jnp.array([[0.0, 1.0], [1.0, 0.0], [0.2, 0.1], [0.5, 0.7]])
    batch = Batch(rollout, reward, jnp.ones((4, 2), bool))

    def updated(config, mesh=None):
        optimizer = optax.sgd(0.1)
        learner = Learner(Spec(engine.model_config, config, 0.8, limit), Optimizers(optimizer))
        start, given = jax.tree.map(jnp.copy, params), batch
        if mesh is not None:
            axes = logical_axes(engine.model_config)
            start = jax.device_put(start, shard_tree(axes, mesh, start))
            given = place_batch(batch, mesh)
        state = init_state(jax.random.key(0), init_model(start, optimizer))
        schedule = learner.schedule(state.rng, rollout, 1 if mesh is None else 4)
        made = learner.experience(Models(start, start), given, schedule=schedule)
        state, metrics = learner.update(state, made, schedule=schedule)
        return jax.device_get(state.policy.params), float(metrics["sampler/gap"].value)

    config = AlgorithmConfig(kl_coef=0.1, is_cap=2.0, scale="none")
    whole, gap = updated(config)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        spread, gap_spread = updated(config, mesh)
    parts, gap_parts = updated(dataclasses.replace(config, microbatches=2))
    by_tokens, gap_tokens = updated(dataclasses.replace(config, microbatch_tokens=200))
    assert max(gap, gap_spread, gap_parts, gap_tokens) < 1e-5
    for other in (spread, parts, by_tokens):
        for a, b in zip(*map(jax.tree.leaves, (whole, other)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_grammar_comes_before_the_filters(engine, params):
    engine = dataclasses.replace(engine, sampling=SamplingConfig(temperature=0.8, top_k=3))
    room = BlockLimits(thinking=3, payoff=10, analyze=3, response=3)
    made = jax.device_get(engine_lib.make_constraint(engine, room))
    budget = grammar.shortest(made) + 16
    made = made._replace(budget=np.int32(budget))
    buckets = dataclasses.replace(engine.buckets, completion=(budget,))
    engine = dataclasses.replace(engine, buckets=buckets)
    rollout, limit = drawn(engine, params, made, budget), limit_of(made, engine.sampling, budget)
    logp, _ = jax.jit(lambda p: scored(p, rollout, engine, limit))(params)
    mask = np.asarray(rollout.completions.action_mask)
    np.testing.assert_allclose(logp[mask], rollout.completions.logp[mask], atol=1e-5)


def test_a_token_that_was_drawn_stays_though_it_fell_below():
    logits = jnp.array([[3.0, 2.0, 1.0, 0.0]] * 3)
    kept = filtered_logits(SamplingConfig(top_k=2), jnp.array([1, 4, 0]), logits) > FAR_BELOW
    assert kept.tolist() == [[True, True, False, False], [True, True, False, True], [True] * 4]
    assert limit_of(None, SamplingConfig(), 8) is None
