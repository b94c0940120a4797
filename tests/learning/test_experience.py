"""What becomes of a scored rollout: masks, baselines, KL and length in the reward, the critic's values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.errors import UserError
from gtalign_jax.learning import experience
from gtalign_jax.learning.advantages import gae, group_advantages, whiten
from gtalign_jax.learning.algorithm import PRESETS, AlgorithmConfig
from gtalign_jax.learning.experience import Masks, Penalties
from gtalign_jax.learning.logprobs import token_logprobs
from gtalign_jax.learning.scores import Scores
from gtalign_jax.learning.spec import Spec
from gtalign_jax.learning.vocabulary import Head
from gtalign_jax.models.heads import init_value_model, token_values
from gtalign_jax.types import Batch, Models, Reward


@pytest.fixture(scope="module")
def make(model, params, reference, rollout, valid):
    """make_experience of a config and a reward."""
    program = jax.jit(experience.make_experience, static_argnums=0)

    def run(config, reward, critic=None, components=None, kl_coef=None, response=None):
        batch = Batch(rollout, reward, valid, components, response=response)
        return program(Spec(model, config, 0.7), Models(params, reference, critic), batch, kl_coef)

    return run


@pytest.fixture(scope="module")
def logps(model, params, reference, rollout):
    """Trainer's and reference's logprobs."""
    args = (rollout.prompts, rollout.completions.tokens, Head(0.7))
    f = jax.jit(lambda p: token_logprobs(p, model, *args)[0])
    return np.asarray(f(params)), np.asarray(f(reference))


def test_a_missing_reward_is_in_no_statistic(make, rollout, reward, valid):
    """NaN stands where there is no verdict: nothing else becomes NaN, its partner has no baseline."""
    got = make(PRESETS["dr_grpo"], reward.at[2, 1].set(jnp.nan))
    mask = np.asarray(rollout.completions.action_mask)
    assert np.isfinite(got.advantage).all()
    assert not got.completions.action_mask[2, 1].any() and not got.advantage[2].any()
    want = np.asarray(group_advantages(reward, valid, "none"))[..., None] * mask
    np.testing.assert_allclose(got.advantage, want, atol=1e-6)
    assert got.ref_logp is None and got.returns is None and got.is_weight is None


def test_truncated_rows_are_masked_but_stay_in_the_baseline(make, rollout, reward, valid):
    got, written = make(AlgorithmConfig(scale="none", drop_truncated=True), reward), rollout.completions
    keep = np.asarray(written.action_mask) & np.asarray(written.finished & valid)[..., None]
    assert (np.asarray(got.completions.action_mask) == keep).all()
    want = np.asarray(group_advantages(reward, valid, "none"))[..., None] * keep
    np.testing.assert_allclose(got.advantage, want, atol=1e-6)
    assert not np.asarray(written.finished).all()


def test_kl_in_the_reward(make, rollout, reward, valid, logps):
    """k1 times the coefficient comes off each row's reward before its group is centred."""
    config = AlgorithmConfig(scale="none", kl_coef=0.5, kl_place="reward", kl_estimator="k1")
    mask = np.asarray(rollout.completions.action_mask & valid[..., None])
    for coef, extra in ((0.5, {}), (0.125, {"kl_coef": jnp.asarray(0.125)})):  # a controller's replaces it
        got = make(config, reward, **extra)
        total = np.asarray(reward) - coef * np.sum((logps[0] - logps[1]) * mask, axis=-1)
        want = np.asarray(group_advantages(total, valid, "none"))[..., None] * mask
        np.testing.assert_allclose(got.advantage, want, atol=1e-5)
        np.testing.assert_allclose(got.old_logp, logps[0], atol=1e-6)


@pytest.fixture(scope="module")
def response(rollout):
    """All tokens of a completion but its first; some responses are empty."""
    return jnp.arange(4) > jnp.zeros_like(rollout.completions.length)[..., None]


def test_fluency_is_what_the_reference_says_of_the_response(make, rollout, reward, valid, logps, response):
    got = make(PRESETS["grpo"], reward, response=response).fluency
    tokens = np.asarray(rollout.completions.action_mask & valid[..., None] & response)
    np.testing.assert_allclose(got.total, np.sum(logps[1] * tokens, axis=-1), atol=1e-5)
    np.testing.assert_array_equal(got.count, tokens.sum(-1))
    whole = make(PRESETS["grpo"], reward).fluency  # a plain answer is a response from end to end
    np.testing.assert_array_equal(whole.count, (rollout.completions.action_mask & valid[..., None]).sum(-1))
    assert make(PRESETS["dr_grpo"], reward, response=response).fluency is None  # nobody asks a reference


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_response_under_the_floor_earns_nothing(make, rollout, reward, valid, logps, response, kl_coef):
    tokens = np.asarray(rollout.completions.action_mask & valid[..., None] & response)
    mean = np.sum(logps[1] * tokens, axis=-1) / np.maximum(tokens.sum(-1), 1)
    floor = float(np.median(mean[tokens.any(-1)]))
    config = AlgorithmConfig(scale="none", kl_coef=kl_coef, fluency_floor=floor)
    got = make(config, reward, response=response)
    kept = jnp.where(mean < floor, 0.0, reward)
    want = np.asarray(group_advantages(kept, valid, "none"))[..., None]
    mask = np.asarray(rollout.completions.action_mask & valid[..., None])
    np.testing.assert_allclose(got.advantage, np.where(mask, want, 0.0), atol=1e-6)
    assert 0 < (mean < floor).sum() < mean.size / 2 + 1


def test_no_part_of_the_reward_stays_under_the_floor(make, reward, response):
    components = jnp.stack([reward, 1 - reward])
    config = dataclasses.replace(PRESETS["gdpo"], fluency_floor=-1e-6)  # all that say something are under it
    got = make(config, reward, components=components, response=response)
    everything = jnp.ones_like(response)
    assert np.abs(got.advantage).max() > 0  # rows without a response keep what they have
    assert not np.asarray(make(config, reward, components=components, response=everything).advantage).any()


def test_long_rows_lose_reward(make, rollout, reward, valid):
    """Budget 4, margin half of it: 3 tokens lose half of the penalty, 4 all of it."""
    config = AlgorithmConfig(scale="none", overlong_penalty=0.6, overlong_margin=0.5, max_tokens=4)
    got, written = make(config, reward), rollout.completions
    ramp = np.array([0.0, 0.0, 0.0, 0.3, 0.6])[np.asarray(written.length)]
    want = np.asarray(group_advantages(reward - ramp, valid, "none"))[..., None] * written.action_mask
    np.testing.assert_allclose(got.advantage, np.where(valid[..., None], want, 0.0), atol=1e-6)


def test_importance_weights(make, rollout, reward, logps):
    got = make(AlgorithmConfig(is_cap=1.5), reward)
    want = np.minimum(np.exp(logps[0] - np.asarray(rollout.completions.logp)), 1.5)
    np.testing.assert_allclose(got.is_weight, want, rtol=1e-5)


@pytest.fixture(scope="module")
def critic(model, params):
    value = init_value_model(params, model)
    head = jax.random.normal(jax.random.key(3), value["head"].shape)
    return value | {"head": head, "bias": jnp.asarray(0.3)}


def test_gae_of_a_critic(make, model, rollout, reward, valid, critic):
    """Truncated rows go on with the value after their last token, also in the last column of the bucket."""
    config = AlgorithmConfig(advantage="gae", gamma=0.9, lam=0.8, bootstrap_truncated=True)
    got = make(config, reward, critic)
    mask = rollout.completions.action_mask & valid[..., None]
    prompts = rollout.prompts
    longer = jnp.pad(rollout.completions.tokens, ((0, 0), (0, 0), (0, 3)), constant_values=5)
    value = jax.jit(token_values, static_argnums=1)(critic, model, prompts.tokens, prompts.length, longer)
    last = jnp.arange(4) == rollout.completions.length[..., None] - 1
    after = jnp.take_along_axis(value, rollout.completions.length[..., None], -1)[..., 0]
    after = jnp.where(rollout.completions.finished, 0.0, after)
    want, returns = gae(last * reward[..., None], value[..., :4], mask, 0.9, 0.8, after)
    np.testing.assert_allclose(got.returns, returns, atol=1e-5)
    np.testing.assert_allclose(got.advantage, whiten(want, mask), atol=1e-5)
    np.testing.assert_allclose(got.old_value, value[..., :4], atol=1e-5)


def test_a_fresh_critic_says_zero(model, params, rollout):
    args = (rollout.prompts.tokens, rollout.prompts.length, rollout.completions.tokens)
    assert not jax.jit(token_values, static_argnums=1)(init_value_model(params, model), model, *args).any()


def test_gdpo_takes_the_parts_of_a_reward(make, rollout, valid):
    rng = np.random.default_rng(5)
    flat = rng.random((3, valid.size)).astype(np.float32)
    scored = Reward(user=flat[0], llm=flat[1], welfare=flat[2], parts={"format": 1 - flat[0]})
    parts = experience.reward_components(scored, ("user", "format")).reshape(2, *valid.shape)
    np.testing.assert_array_equal(parts[1].reshape(-1), 1 - flat[0])
    config = AlgorithmConfig(scale="gdpo", components=("user", "format"), component_weights=(1.0, 3.0))
    got = make(config, jnp.zeros(valid.shape), components=parts)
    # `format` is 1 - `user`: normalised, its advantage is the opposite one, and its weight is larger.
    want = whiten(group_advantages(-parts[0], valid, "std"), valid)
    np.testing.assert_allclose(got.advantage, want[..., None] * got.completions.action_mask, atol=1e-3)
    with pytest.raises(UserError, match="no part 'wit'; this reward has user, llm, welfare, format"):
        experience.reward_components(scored, ("wit",))
    with pytest.raises(UserError, match="components"):
        make(config, jnp.zeros(valid.shape))


def test_gdpo_counts_length_as_one_more_component(valid):
    config = AlgorithmConfig(scale="gdpo", components=("user",), overlong_penalty=0.5)
    overlong = jnp.zeros(valid.shape).at[:, 0].set(0.4)
    known = jnp.ones((*valid.shape, 1), bool)
    equal = jnp.ones((1, *valid.shape))
    batch, penalties = Batch(None, equal[0], valid, equal), Penalties(overlong=overlong)
    got, _ = jax.jit(experience.compute_advantages, static_argnums=0)(
        config, batch, Masks(known, known), penalties, Scores(None, None, None, None)
    )
    pairs = np.asarray(valid).all(-1)
    assert (got[pairs, 0] < 0).all() and (got[pairs, 1] > 0).all() and not got[~pairs].any()


def rank_scale(reward, valid):
    """Half the range between the best and the rest of a group."""
    best = reward == jnp.max(jnp.where(valid, reward, -jnp.inf), axis=-1, keepdims=True)
    return jnp.where(best, 0.5, -0.5)


def test_a_users_own_scale(make, reward, valid):
    got = make(AlgorithmConfig(scale=f"{__name__}:rank_scale"), reward)
    want = np.where(valid, rank_scale(reward, valid), 0.0)[..., None] * got.completions.action_mask
    np.testing.assert_array_equal(got.advantage, want)


def test_the_reward_sits_on_the_last_action():
    mask = jnp.array([[True, False, True, False], [False] * 4])
    got = experience.on_last_token(jnp.array([2.0, 3.0]), mask)
    np.testing.assert_array_equal(got, [[0, 0, 2.0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_experience(name, rollout, reward, valid):
    """Finite, zero outside the mask, the same for a reward shifted by a constant."""
    config, shape = PRESETS[name], (*valid.shape, 4)
    known = rollout.completions.action_mask & valid[..., None]
    one = dataclasses.replace(config, lam=1.0)
    scores = Scores(None, None, jnp.zeros(shape), None)

    @jax.jit
    def run(reward):
        batch = Batch(None, reward, valid, components=jnp.stack([reward, 2 * reward]))
        return experience.compute_advantages(one, batch, Masks(known, known), Penalties(), scores)[0]

    first, second = run(reward), run(reward + 1.0)
    assert np.isfinite(first).all() and first.any() and not np.asarray(first)[~np.asarray(known)].any()
    np.testing.assert_allclose(first, second, atol=2e-3)
