"""A sampler that computes other probabilities than the trainer: measured, and corrected in expectation."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.learning.algorithm import PRESETS, AlgorithmConfig
from gtalign_jax.learning.experience import Masks, Penalties, compute_advantages, make_experience
from gtalign_jax.learning.logprobs import token_logprobs
from gtalign_jax.learning.losses import Columns, policy_loss, truncated_is_weight
from gtalign_jax.learning.scores import Scores
from gtalign_jax.learning.spec import Spec
from gtalign_jax.learning.step_losses import policy_step_loss
from gtalign_jax.types import Batch, Models

ARMS, GROUP = 4, 3
PARAMS = np.array([0.3, -0.7, 1.1, 0.0])
SAMPLER = np.log(np.array([0.55, 0.2, 0.05, 0.2]))  # far from softmax(PARAMS): 0.22, 0.08, 0.50, 0.17
REWARD = np.array([0.2, 1.0, -0.4, 0.9])
# The baseline is made of the other samples, so an update's expectation is the gradient itself.
RLOO = dataclasses.replace(PRESETS["rloo"], max_tokens=1)
NOTHING = Scores(None, None, None, None)


def expected_gradient(cap):
    """The ascent direction averaged over all groups of one-token samples that the sampler may draw."""
    outcomes = np.array(list(itertools.product(range(ARMS), repeat=GROUP)))
    known = jnp.ones((1, GROUP, 1), bool)

    def loss(params, group):
        logp = jax.nn.log_softmax(params)[group][None, :, None]
        old = jax.lax.stop_gradient(logp)
        reward = jnp.asarray(REWARD, jnp.float32)[group][None]
        batch = Batch(None, reward, known[..., 0])
        advantage, _ = compute_advantages(RLOO, batch, Masks(known, known), Penalties(), NOTHING)
        weight = None
        if cap:
            weight = truncated_is_weight(old, jnp.asarray(SAMPLER, jnp.float32)[group][None, :, None], cap)
        return policy_loss(logp, old, Columns(advantage, known, is_weight=weight), RLOO)[0].value

    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(jnp.asarray(PARAMS, jnp.float32), outcomes)
    chance = np.exp(SAMPLER)[outcomes].prod(axis=-1)
    return -np.asarray(chance @ np.asarray(grads))


def exact_gradient(weights=1.0):
    """Of the expected reward under softmax(PARAMS), each arm's share times a weight; float64."""
    p = np.exp(PARAMS) / np.exp(PARAMS).sum()
    score = np.eye(ARMS) - p  # row a: gradient of log p(a)
    return (p * weights * REWARD) @ score, (p * weights) @ score, np.exp(SAMPLER) @ REWARD


def test_importance_weights_give_the_on_policy_gradient_in_expectation():
    want, _, _ = exact_gradient()
    np.testing.assert_allclose(expected_gradient(cap=100.0), want, atol=1e-6)


def test_without_them_the_update_climbs_the_samplers_hill():
    want, _, _ = exact_gradient()
    off = expected_gradient(cap=0.0)
    p = np.exp(PARAMS) / np.exp(PARAMS).sum()
    q = np.exp(SAMPLER)
    np.testing.assert_allclose(off, (q * (REWARD - q @ REWARD)) @ (np.eye(ARMS) - p), atol=1e-6)
    assert off @ want / np.linalg.norm(off) / np.linalg.norm(want) < 0.9


def test_a_cap_trades_variance_for_the_bias_it_is_known_to_have():
    """min(p/q, cap): the expectation is that of the capped weights, baseline and all."""
    p = np.exp(PARAMS) / np.exp(PARAMS).sum()
    ratio = p / np.exp(SAMPLER)
    assert ratio.max() > 2 > np.sort(ratio)[-2]
    first, second, baseline = exact_gradient(np.minimum(ratio, 2.0) / ratio)
    np.testing.assert_allclose(expected_gradient(cap=2.0), first - baseline * second, atol=1e-6)


def test_gap_and_weights_of_a_sampler_that_is_off_by_a_known_amount(model, params, rollout, reward, valid):
    """The server's numbers are the trainer's less delta, and one sample's request failed."""
    delta, cap, written = 0.25, 1.2, rollout.completions
    spec = Spec(model, AlgorithmConfig(is_cap=cap, scale="none"), temperature=0.7)
    true = jax.jit(lambda p: token_logprobs(p, model, rollout.prompts, written.tokens, spec.head)[0])(params)
    failed = jnp.zeros(valid.shape, bool).at[1, 0].set(True)
    length = jnp.where(failed, 0, written.length)
    mask = jnp.arange(written.tokens.shape[-1]) < length[..., None]
    sampled = written.replace(
        length=length,
        action_mask=mask,
        finished=written.finished & ~failed,
        tokens=jnp.where(mask, written.tokens, 0),
        logp=jnp.where(mask, true - delta, 0.0),
    )
    batch = Batch(rollout.replace(completions=sampled), reward, valid & ~failed)
    made = jax.jit(make_experience, static_argnums=0)(spec, Models(params), batch)
    known = mask & valid[..., None]
    np.testing.assert_allclose(made.is_weight[known], min(np.exp(delta), cap), rtol=1e-5)
    assert not made.advantage[1, 0].any() and not made.completions.action_mask[1, 0].any()

    def total(params):
        ratio, metrics = policy_step_loss(params, made, spec=spec)
        return ratio.total, metrics

    (value, metrics), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert float(metrics["sampler/gap"].value) == pytest.approx(delta, abs=1e-5)
    assert float(metrics["sampler/gap"].count) == int(known.sum())
    k3 = np.exp(delta) - 1 - delta  # (old under sampler) with d = -delta
    assert float(metrics["kl/sampler"].value) == pytest.approx(k3, abs=1e-5)


def test_a_rollout_one_update_old_has_its_samplers_logprobs_for_old_ones(
    model, params, reference, rollout, reward, valid
):
    """`reference` sampled, `params` are trained: the clipped ratio is between the two."""
    spec = Spec(model, AlgorithmConfig(scale="none"), temperature=0.7, old_from_sampler=True)
    written = rollout.completions
    logp = jax.jit(lambda p: token_logprobs(p, model, rollout.prompts, written.tokens, spec.head)[0])
    old, mask = logp(reference), written.action_mask
    sampled = written.replace(logp=jnp.where(mask, old, 0.0))
    batch = Batch(rollout.replace(completions=sampled), reward, valid)
    made = make_experience(spec, Models(params), batch)
    known = mask & valid[..., None]
    np.testing.assert_array_equal(made.old_logp, sampled.logp)

    def total(params):
        ratio, metrics = policy_step_loss(params, made, spec=spec)
        return ratio.total, metrics

    (value, metrics), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    def expected(params):
        ratio, a = jnp.exp(logp(params) - old), made.advantage
        return -jnp.sum(jnp.where(known, jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a), 0.0))

    want, want_grads = jax.jit(jax.value_and_grad(expected))(params)
    np.testing.assert_allclose(value, want, rtol=1e-4)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want_grads))
    for a, b in zip(*map(jax.tree.leaves, (grads, want_grads)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * scale)
    gap = np.abs(np.asarray(logp(params) - old))[np.asarray(known)].mean()
    assert float(metrics["sampler/gap"].value) == pytest.approx(gap, rel=1e-5)
