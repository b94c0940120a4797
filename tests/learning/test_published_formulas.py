"""Fixed arrays with the numbers that the published formulas of TRL, verl and Tunix give on them.

The expected values were worked out by hand (see the comments), not by this package.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from gtalign_jax.learning import advantages
from gtalign_jax.learning.algorithm import PRESETS
from gtalign_jax.learning.losses import Columns, aggregate, policy_loss

# Two prompts, four samples. Group 1: mean 0.5, deviations (-.5, .5, -.5, .5), sample std
# sqrt(1 / 3) = 0.57735027. Group 2: mean 0.4, deviations (-.3, -.1, .1, .3), sample std
# sqrt(0.2 / 3) = 0.25819889.
REWARD = jnp.array([[0.0, 1.0, 0.0, 1.0], [0.1, 0.3, 0.5, 0.7]])
VALID = jnp.ones((2, 4), bool)


def test_grpo_advantage_of_trl_and_tunix():
    """(r - mean) / (torch.std + 1e-4): 0.5 / 0.57745027 and (0.3, 0.1) / 0.25829889."""
    want = [[-0.86587544, 0.86587544, -0.86587544, 0.86587544]]
    want += [[-1.16144519, -0.38714840, 0.38714840, 1.16144519]]
    got = advantages.group_advantages(REWARD, VALID, "std", ddof=1, eps=1e-4)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_grpo_advantage_of_verl():
    """The same with epsilon 1e-6: 0.5 / 0.57735127 and (0.3, 0.1) / 0.25819989."""
    want = [[-0.86602390, 0.86602390, -0.86602390, 0.86602390]]
    want += [[-1.16189050, -0.38729683, 0.38729683, 1.16189050]]
    got = advantages.group_advantages(REWARD, VALID, "std", ddof=1, eps=1e-6)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_dr_grpo_advantage():
    want = [[-0.5, 0.5, -0.5, 0.5], [-0.3, -0.1, 0.1, 0.3]]
    np.testing.assert_allclose(advantages.group_advantages(REWARD, VALID, "none"), want, atol=1e-6)


def test_rloo_advantage_of_verl():
    """r n / (n - 1) - mean n / (n - 1): the deviations times 4 / 3."""
    want = [[-2 / 3, 2 / 3, -2 / 3, 2 / 3], [-0.4, -0.4 / 3, 0.4 / 3, 0.4]]
    np.testing.assert_allclose(advantages.group_advantages(REWARD, VALID, "rloo"), want, atol=1e-6)


def test_gae_of_verl():
    """gamma 0.9, lambda 0.8, values (1, 2, 3), reward 4 on the last of three tokens, one pad.

    delta = (0.9 * 2 - 1, 0.9 * 3 - 2, 4 - 3) = (0.8, 0.7, 1); A_2 = 1, A_1 = 0.7 + 0.72 = 1.42,
    A_0 = 0.8 + 0.72 * 1.42 = 1.8224. Whitened with the unbiased variance: mean 1.41413333, squared
    deviations 0.16668167 + 0.00003442 + 0.17150642, over 2 is 0.16911125, its root 0.41123138.
    """
    reward = jnp.array([[0.0, 0.0, 4.0, 9.0]])
    value = jnp.array([[1.0, 2.0, 3.0, 9.0]])
    mask = jnp.array([[True, True, True, False]])
    advantage, returns = advantages.gae(reward, value, mask, 0.9, 0.8)
    np.testing.assert_allclose(advantage, [[1.8224, 1.42, 1.0, 0.0]], atol=1e-6)
    np.testing.assert_allclose(returns, [[2.8224, 3.42, 4.0, 0.0]], atol=1e-6)
    whitened = [[0.99279062, 0.01426609, -1.00705671, 0.0]]
    np.testing.assert_allclose(advantages.whiten(advantage, mask), whitened, atol=2e-6)


# Two rows of ratios (1.5, 0.5) and (1.1, pad, ...), advantages 1 and -2. Clipped to [0.8, 1.2]:
# row 1: min(1.5, 1.2) = 1.2 and min(0.5, 0.8) = 0.5; row 2: min(-2.2, -2.2) = -2.2.
LOGP = jnp.log(jnp.array([[1.5, 0.5, 1.0, 1.0], [1.1, 1.0, 1.0, 1.0]]))
OLD = jnp.zeros((2, 4))
ADVANTAGE = jnp.array([[1.0] * 4, [-2.0] * 4])
MASK = jnp.array([[True, True, False, False], [True, False, False, False]])


def loss(preset, **changes):
    config = dataclasses.replace(PRESETS[preset], **changes)
    return float(policy_loss(LOGP, OLD, Columns(ADVANTAGE, MASK), config)[0].value)


def test_grpo_loss_is_the_mean_of_row_means():
    """TRL loss_type grpo: mean of -(1.7 / 2) and 2.2, without the KL term."""
    np.testing.assert_allclose(loss("grpo", kl_coef=0.0), (-0.85 + 2.2) / 2, rtol=1e-6)


def test_dapo_loss_is_the_mean_over_all_tokens():
    """TRL dapo, verl token-mean; clip_high 0.28: -(1.28 + 0.5 - 2.2) / 3."""
    np.testing.assert_allclose(loss("dapo"), 0.42 / 3, rtol=1e-6)


def test_dr_grpo_loss_divides_by_the_budget():
    """TRL dr_grpo, max_completion_length 10: -(1.2 + 0.5 - 2.2) / (2 * 10); without it the width 4."""
    np.testing.assert_allclose(loss("dr_grpo", max_tokens=10), 0.5 / 20, rtol=1e-6)
    np.testing.assert_allclose(loss("dr_grpo"), 0.5 / 8, rtol=1e-6)


def test_gspo_loss_of_verl():
    """s = exp(mean log ratio): sqrt(0.75) = 0.8660254 in row 1, over its bound 1 - 3e-4 with A > 0 the
    minimum is s itself; 1.1 in row 2, A < 0: -2.2. Mean of rows."""
    np.testing.assert_allclose(loss("gspo"), (-0.8660254 + 2.2) / 2, rtol=1e-6)


def test_dual_clip_of_verl():
    """c = 3, A = -2, ratio 5: the loss is 2 * 3, not 2 * 5."""
    got = policy_loss(
        jnp.log(jnp.array([[5.0]])),
        jnp.zeros((1, 1)),
        Columns(jnp.array([[-2.0]]), jnp.ones((1, 1), bool)),
        PRESETS["ppo_paper"],
    )[0]
    np.testing.assert_allclose(got.value, 6.0, rtol=1e-6)


def test_micro_batches_add_up_to_the_token_mean():
    """Token counts 2 and 1: the mean of micro-batch means would be 1.0, the token mean is 2 / 3."""
    x = jnp.array([[0.0, 0.0], [2.0, 0.0]])
    mask = jnp.array([[True, True], [True, False]])
    parts = [aggregate(x[i : i + 1], mask[i : i + 1], "token", 0) for i in range(2)]
    np.testing.assert_allclose((parts[0] + parts[1]).value, 2 / 3, rtol=1e-6)
    assert np.mean([float(p.value) for p in parts]) == 1.0
