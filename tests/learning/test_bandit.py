"""Exact expected updates on policies small enough to enumerate every outcome of a group.

What is exact, in this file's words. Let J be the expected reward and g its gradient.
- RLOO gives g itself, Dr. GRPO (G - 1) / G of it (its baseline holds the sample), both over max_tokens,
  for any reward and any lengths.
- Advantages divided by a standard deviation (GRPO, DAPO, GSPO, CISPO, GDPO, REINFORCE++, whitened PPO
  with a fresh critic) give a positive multiple of g when the reward takes two values and all completions
  are equally long: then E[A | y] depends on the value of r(y) alone. With more values they do not, and
  the last test shows one that does not.
- The bend is that of a small group: in one that holds every completion as often as the policy draws it,
  every preset gives a positive multiple of g for any reward, with GAE whatever its lambda.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.learning.advantages import gae
from gtalign_jax.learning.algorithm import PRESETS
from gtalign_jax.learning.experience import Masks, Penalties, compute_advantages
from gtalign_jax.learning.losses import Columns, kl_estimate, policy_loss
from gtalign_jax.learning.scores import Scores
from gtalign_jax.types import Batch

GROUP = 3
BINARY = np.array([1.0, 0.0, 0.0, 1.0])


def sequences(params, length):
    """Per-token logprobs [Y, length] of all 0/1 sequences of a length, one logit for each prefix."""
    words = np.array(list(itertools.product((0, 1), repeat=length)))
    columns, node = [], np.zeros(len(words), int)
    for t in range(length):
        logit = params[2**t - 1 + node]
        columns.append(jax.nn.log_sigmoid(jnp.where(words[:, t] == 1, logit, -logit)))
        node = 2 * node + words[:, t]
    return jnp.stack(columns, axis=-1)


def expected_gradient(params, config, reward, length, mask=None):
    """The ascent direction of one on-policy update, averaged over all groups that the policy may draw.

    reward [Y]; mask [Y, length]: which tokens of a sequence exist. The reference is the policy itself.
    """
    count = 2**length
    mask = np.ones((count, length), bool) if mask is None else mask
    outcomes = jnp.array(list(itertools.product(range(count), repeat=GROUP)))
    reward, mask = jnp.asarray(reward, jnp.float32), jnp.asarray(mask)
    value = jnp.zeros((count, length))

    def weighted(params, group):
        total = jnp.sum(jnp.where(mask, sequences(params, length), 0.0), axis=-1)
        drawn = reward[group], value[group], mask[group]
        return jnp.exp(jnp.sum(total[group])), jax.grad(group_loss)(params, config, group, *drawn)

    weight, grads = jax.vmap(weighted, in_axes=(None, 0))(params, outcomes)
    return -jnp.sum(weight[:, None] * grads, axis=0)


def group_loss(params, config, group, reward, value, mask):
    """The on-policy loss of one group: sequence numbers [G], rewards [G], values and mask [G, length]."""
    logp = sequences(params, mask.shape[-1])[group][None]
    known = mask[None]
    old = jax.lax.stop_gradient(logp)
    parts = jnp.stack([0.25 * reward, 0.75 * reward])[:, None]
    batch = Batch(None, reward[None], jnp.ones((1, len(group)), bool), components=parts)
    penalties = Penalties(token=config.kl_coef * kl_estimate(old, old, config.kl_estimator))
    scores = Scores(old, old, value[None], None)
    advantage, _ = compute_advantages(config, batch, Masks(known, known), penalties, scores)
    return policy_loss(logp, old, Columns(advantage, known, ref_logp=old), config)[0].value


def exact_gradient(params, reward, length, mask=None):
    mask = np.ones((2**length, length), bool) if mask is None else mask
    total = lambda x: jnp.sum(jnp.where(mask, sequences(x, length), 0.0), axis=-1)
    return jax.grad(lambda x: jnp.sum(jnp.exp(total(x)) * jnp.asarray(reward)))(params)


def cosine(a, b):
    return float(jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b))


direction = jax.jit(expected_gradient, static_argnums=(1, 3))
group_gradient = jax.jit(jax.grad(group_loss), static_argnums=1)
PARAMS = jnp.array([0.3, -0.7, 1.1])
# lam < 1 trades bias for variance: without a critic, early tokens are told of less than the reward.
EXACT_ON_TWO_VALUES = [name for name in PRESETS if PRESETS[name].lam == 1.0]


@pytest.mark.parametrize("name", EXACT_ON_TWO_VALUES)
def test_expected_update_is_a_multiple_of_the_policy_gradient(name):
    """Two tokens, three parameters, a reward of two values."""
    got = expected_gradient_of(name, BINARY)
    want = exact_gradient(PARAMS, BINARY, 2)
    assert cosine(got, want) == pytest.approx(1.0, abs=1e-5)


def expected_gradient_of(name, reward):
    return direction(PARAMS, PRESETS[name], reward, 2)


@pytest.mark.parametrize(("name", "factor"), [("rloo", 1 / 2), ("dr_grpo", (GROUP - 1) / GROUP / 2)])
def test_unscaled_advantages_are_exact_for_any_reward(name, factor):
    reward = np.array([0.2, 1.0, -0.4, 0.9])
    got = expected_gradient_of(name, reward)
    np.testing.assert_allclose(got, factor * exact_gradient(PARAMS, reward, 2), atol=1e-6)


@pytest.mark.parametrize(("name", "factor"), [("rloo", 1 / 2), ("dr_grpo", (GROUP - 1) / GROUP / 2)])
def test_constant_aggregation_is_exact_for_any_length(name, factor):
    """A first 0 ends the sequence: the second token of (0, 0) is not there, and (0, 1) is not drawn."""
    mask = np.array([[True, False], [True, True], [True, True], [True, True]])
    reward = np.array([0.5, 0.0, 0.1, 1.0])

    params = PARAMS.at[1].set(-40.0)  # makes (0, 1) impossible
    got = direction(params, PRESETS[name], reward, 2, mask)
    want = exact_gradient(params, reward, 2, mask)
    np.testing.assert_allclose(got[jnp.array([0, 2])], factor * want[jnp.array([0, 2])], atol=1e-6)
    biased = direction(params, dataclasses.replace(PRESETS[name], aggregation="sequence"), reward, 2, mask)
    assert cosine(biased[jnp.array([0, 2])], want[jnp.array([0, 2])]) < 0.999


@pytest.mark.parametrize("name", PRESETS)
def test_one_token_and_the_way_to_the_optimum(name):
    """A two-armed bandit: every preset's expected update points the right way, and its ascent arrives."""
    reward, start = np.array([0.2, 0.8]), jnp.array([-1.0])
    climb = lambda x: x + 3.0 * expected_gradient(x, PRESETS[name], reward, 1)
    step = lambda x, _: (climb(x),) * 2
    path = jax.jit(lambda x: jax.lax.scan(step, x, None, length=200)[1])(start)
    probability = jax.nn.sigmoid(path[:, 0])
    assert (jnp.diff(path[:20, 0]) > 0).all() and path[0, 0] > start[0]
    assert float(exact_gradient(start, reward, 1)[0]) > 0
    assert float(probability[-1]) > 0.97


@pytest.mark.parametrize("name", PRESETS)
def test_a_group_that_is_the_distribution_gives_the_policy_gradient(name):
    """16 samples, each sequence as often as its probability says, a reward of four values, true values."""
    logit = lambda p: np.log(p / (1 - p))
    params = jnp.asarray([logit(1 / 4), logit(1 / 2), logit(3 / 4)], jnp.float32)
    group = jnp.repeat(jnp.arange(4), jnp.array([6, 6, 1, 3]))
    p, reward = np.array([6, 6, 1, 3]) / 16, np.array([0.2, 1.0, -0.4, 0.9])
    after = [(p * reward)[i : i + 2].sum() / p[i : i + 2].sum() for i in (0, 0, 2, 2)]
    value = jnp.asarray(np.stack([np.full(4, p @ reward), after], axis=-1), jnp.float32)
    drawn = jnp.asarray(reward, jnp.float32)[group], value[group], jnp.ones((16, 2), bool)
    got = -group_gradient(params, PRESETS[name], group, *drawn)
    assert cosine(got, exact_gradient(params, reward, 2)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_with_the_true_values_is_unbiased_for_every_lambda(lam):
    """E sum_t A_t grad log pi_t = grad J, over the four sequences."""
    reward = jnp.array([0.2, 1.0, -0.4, 0.9])
    logp = sequences(PARAMS, 2)
    p = jnp.exp(logp.sum(-1))
    after = jnp.array([jnp.sum((p * reward)[i : i + 2]) / jnp.sum(p[i : i + 2]) for i in (0, 0, 2, 2)])
    value = jnp.stack([jnp.full(4, jnp.sum(p * reward)), after], axis=-1)
    advantage, _ = gae(jnp.stack([0 * reward, reward], -1), value, jnp.ones((4, 2), bool), 1.0, lam)
    got = jax.grad(lambda x: jnp.sum(p[:, None] * advantage * sequences(x, 2)))(PARAMS)
    np.testing.assert_allclose(got, exact_gradient(PARAMS, reward, 2), atol=1e-6)


def test_a_standard_deviation_bends_the_direction_when_rewards_have_many_values():
    reward = np.array([0.0, 0.1, 0.2, 3.0])
    bent = cosine(expected_gradient_of("grpo", reward), exact_gradient(PARAMS, reward, 2))
    assert 0 < bent < 0.99
