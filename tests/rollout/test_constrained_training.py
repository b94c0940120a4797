"""The trainer's distributions under the grammar are those that decoding drew from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.learning.experience import make_experience
from gtalign_jax.learning.logprobs import token_logprobs
from gtalign_jax.learning.spec import Spec
from gtalign_jax.learning.step_losses import policy_step_loss
from gtalign_jax.learning.vocabulary import CHUNK, Head
from gtalign_jax.models.config import ModelConfig, RuntimeConfig
from gtalign_jax.models.transformer import forward_shared, init_params, unembed
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generate, grammar
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.grammar import BlockLimits
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.types import Batch, Limit, Models

N, G, TEMPERATURE = 96, 2, 0.8
ROOM = BlockLimits(thinking=5, payoff=20, analyze=5, response=6)


@pytest.fixture(scope="module")
def engine(tokenizer) -> Engine:
    config = ModelConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        initializer_range=0.3,
        runtime=RuntimeConfig(scan_layers=False),
    )
    buckets = BucketConfig(prompt=(4,), completion=(N,), batch=(4,))
    return Engine(
        tokenizer, config, (tokenizer.eos_token_id,), SamplingConfig(temperature=TEMPERATURE), buckets
    )


@pytest.fixture(scope="module")
def params(engine):
    return jax.jit(init_params, static_argnums=1)(jax.random.key(0), engine.model_config)


@pytest.fixture(scope="module")
def constraint(engine):
    made = jax.device_get(engine_lib.make_constraint(engine, ROOM))
    return made._replace(budget=np.int32(grammar.shortest(made) + 30))


@pytest.fixture(scope="module")
def limit(constraint) -> Limit:
    states, logits = (
        functools.partial(f, constraint) for f in (grammar.action_states, grammar.limited_logits)
    )
    return Limit(states, logits)


@pytest.fixture(scope="module")
def rollout(engine, params, constraint):
    batch = engine_lib.prompt_batch(engine, [[5], [6, 7], [8, 9, 10], [11]])
    request = Request(batch, jax.random.key(1), G, int(constraint.budget), constraint=constraint)
    rollout = generate.rollout(engine, params, request)
    # Two tokens of one row count as forced, as steering's are: they are no actions.
    written = rollout.completions
    written = written.replace(action_mask=written.action_mask.at[1, 0, 3:5].set(False))
    return rollout.replace(completions=written)


def _scored(params, rollout, engine, limit=None, chunk=CHUNK):
    head, at = Head(TEMPERATURE, chunk, limit and limit.logits), limit and limit.states(rollout.completions)
    return token_logprobs(params, engine.model_config, rollout.prompts, rollout.completions.tokens, head, at)


def test_the_trainer_computes_the_samplers_logprobs(engine, params, rollout, limit):
    logp, entropy = jax.jit(lambda p: _scored(p, rollout, engine, limit, chunk=77))(params)
    mask, drawn = np.asarray(rollout.completions.action_mask), rollout.completions.logp
    assert np.isfinite(logp).all() and np.isfinite(entropy).all()
    np.testing.assert_allclose(logp[mask], drawn[mask], atol=1e-5)
    free, _ = jax.jit(lambda p: _scored(p, rollout, engine))(params)
    assert np.abs(free[mask] - drawn[mask]).mean() > 0.1  # the grammar matters here
    # What was not chosen here is scored without the grammar.
    np.testing.assert_allclose(logp[~mask], free[~mask], atol=1e-5)


def _dense(params, engine, constraint, rollout):
    """(logp, entropy) [P, G, N] with whole logits and no number that stands for minus infinity."""
    config, prompts, written = engine.model_config, rollout.prompts, rollout.completions
    hidden = forward_shared(params, config, prompts.tokens, prompts.length, written.tokens)
    _, before = grammar.replay(constraint, written.tokens, written.length)
    flat = jnp.zeros((*written.tokens.shape, config.vocab_size))
    allowed = jnp.isfinite(grammar.masked_logits(constraint, before, flat)) | ~written.action_mask[..., None]
    logits = unembed(params, config, hidden) / TEMPERATURE
    weight = jnp.where(allowed, jnp.exp(logits - logits.max(-1, keepdims=True)), 0.0)
    p = weight / weight.sum(-1, keepdims=True)
    chosen = jnp.take_along_axis(p, written.tokens[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.where(allowed, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
    return jnp.log(chosen), entropy


def test_gradients_are_those_of_whole_logits(engine, params, constraint, rollout, limit):
    mask = rollout.completions.action_mask
    weight = jax.random.normal(jax.random.key(2), (2, *mask.shape)) * mask

    def loss(score):
        return lambda p: sum(jnp.sum(w * x) for w, x in zip(weight, score(p), strict=True))

    ours = loss(lambda p: _scored(p, rollout, engine, limit, chunk=50))
    tables = jax.tree.map(jnp.asarray, constraint)
    dense = loss(lambda p: _dense(p, engine, tables, rollout))
    got, want = (jax.jit(jax.value_and_grad(f))(params) for f in (ours, dense))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want[1]))
    for a, b in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)


def test_the_update_sees_no_gap_to_the_constrained_sampler(engine, params, rollout, limit):
    """Old, new and reference logprobs are under the limit: no gap, no KL; without it there is a gap."""
    config = AlgorithmConfig(kl_coef=0.1, is_cap=2.0, minibatches=2)
    batch = Batch(rollout, jnp.arange(8, dtype=jnp.float32).reshape(4, 2), jnp.ones((4, 2), bool))

    def gap(limit):
        spec = Spec(engine.model_config, config, TEMPERATURE, limit)

        @jax.jit
        def run(p):
            made = make_experience(spec, Models(p, p), batch)
            _, metrics = policy_step_loss(p, made, spec=spec)
            return made.is_weight, {name: m.value for name, m in metrics.items()}

        return run(params)

    weight, metrics = gap(limit)
    assert metrics["sampler/gap"] < 1e-5 and metrics["kl/ref"] < 1e-6 and metrics["kl/old"] < 1e-6
    np.testing.assert_allclose(weight[rollout.completions.action_mask], 1.0, atol=1e-4)
    assert gap(None)[1]["sampler/gap"] > 0.1
