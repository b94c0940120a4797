"""Advantages against loops in NumPy float64 on random ragged batches, and their invariances."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.learning import advantages

gae = jax.jit(advantages.gae)
discounted_returns = jax.jit(advantages.discounted_returns)
group_advantages = jax.jit(advantages.group_advantages, static_argnames=("scale", "ddof", "eps"))


def ragged(seed, rows=6, width=9):
    """(reward, value, mask) [rows, width] with holes, short rows and an empty one."""
    rng = np.random.default_rng(seed)
    mask = np.arange(width) < rng.integers(0, width + 1, size=(rows, 1))
    mask &= rng.random((rows, width)) > 0.2
    return rng.normal(size=(rows, width)), rng.normal(size=(rows, width)), mask


def groups(seed, prompts=5, group=6, missing=0.25):
    """(reward, valid) [P, G]: a flat group, an almost empty one, NaN where the reward is missing."""
    rng = np.random.default_rng(seed)
    reward = rng.random((prompts, group))
    valid = rng.random((prompts, group)) > missing
    reward[0] = 0.7
    valid[1] = False
    valid[1, 2] = True
    return np.where(valid, reward, np.nan), valid


def gae_by_loop(reward, value, mask, gamma, lam, bootstrap):
    """The sum over future temporal differences, written out for every column."""
    advantage = np.zeros_like(reward)
    for i in range(len(reward)):
        columns = np.flatnonzero(mask[i])
        values = [*value[i, columns], bootstrap[i]]
        delta = [reward[i, c] + gamma * values[j + 1] - values[j] for j, c in enumerate(columns)]
        for j, c in enumerate(columns):
            advantage[i, c] = sum((gamma * lam) ** (k - j) * delta[k] for k in range(j, len(columns)))
    return advantage


def group_by_loop(reward, valid, scale, ddof, eps):
    out = np.zeros_like(reward)
    for p in range(len(reward)):
        known = np.flatnonzero(valid[p])
        r = reward[p, known]
        if len(known) < 2 or np.ptp(r) == 0:
            continue
        for i, g in enumerate(known):
            baseline = np.mean(np.delete(r, i)) if scale == "rloo" else np.mean(r)
            out[p, g] = (r[i] - baseline) / (np.std(r, ddof=ddof) + eps if scale == "std" else 1.0)
    return whiten_by_loop(out, valid, ddof) if scale == "batch" else out


def whiten_by_loop(x, mask, ddof=1):
    inside = x[mask]
    return np.where(mask, (x - inside.mean()) / np.sqrt(inside.var(ddof=ddof) + 1e-8), 0.0)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7), (0.97, 0.0)])
@pytest.mark.parametrize("bootstrapped", [False, True])
def test_gae(gamma, lam, bootstrapped):
    for seed in range(4):
        reward, value, mask = ragged(seed)
        after = np.random.default_rng(seed + 9).normal(size=len(reward)) * bootstrapped
        got, returns = gae(reward, value, mask, gamma, lam, after if bootstrapped else None)
        want = gae_by_loop(reward, value, mask, gamma, lam, after)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(returns, np.where(mask, want + value, 0.0), rtol=1e-5, atol=1e-6)


def test_gae_in_float64_is_exact():
    with jax.enable_x64(True):
        reward, value, mask = ragged(3)
        got, _ = gae(reward, value, mask, 0.93, 0.8)
        want = gae_by_loop(reward, value, mask, 0.93, 0.8, np.zeros(len(reward)))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


def test_returns_are_discounted_sums():
    reward, _, mask = ragged(5)
    want = np.zeros_like(reward)
    for i, row in enumerate(mask):
        columns = np.flatnonzero(row)
        for j, c in enumerate(columns):
            want[i, c] = sum(0.9**k * reward[i, d] for k, d in enumerate(columns[j:]))
    np.testing.assert_allclose(discounted_returns(reward, mask, 0.9), want, atol=1e-6)


@pytest.mark.parametrize("scale", advantages.SCALES)
@pytest.mark.parametrize(("ddof", "eps"), [(1, 1e-4), (0, 1e-6)])
def test_group_advantages(scale, ddof, eps):
    for seed in range(4):
        reward, valid = groups(seed)
        got = group_advantages(reward, valid, scale, ddof=ddof, eps=eps)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, group_by_loop(reward, valid, scale, ddof, eps), atol=2e-6)


def test_decoupled_advantages():
    weights = np.array([1.0, 0.5, 2.0])
    _, valid = groups(7)
    parts = np.stack([np.where(valid, groups(10 + c, missing=0.0)[0] * 10.0**c, np.nan) for c in range(3)])
    got = advantages.decoupled_advantages(parts, weights, valid)
    want = sum(w * group_by_loop(r, valid, "std", 1, 1e-4) for w, r in zip(weights, parts, strict=True))
    np.testing.assert_allclose(got, whiten_by_loop(want, valid), atol=3e-6)


def test_a_small_component_keeps_its_say():
    """Summed first, a component of range 100 drowns one of range 1; decoupled, both move the policy."""
    large, small = jnp.array([[0.0, 100.0, 0.0, 100.0]]), jnp.array([[0.0, 0.0, 1.0, 1.0]])
    valid = jnp.ones((1, 4), bool)
    summed = group_advantages(large + small, valid, "std")[0]
    decoupled = advantages.decoupled_advantages(jnp.stack([large, small]), jnp.ones(2), valid)[0]
    assert abs(float(summed[2] - summed[0])) < 0.02
    np.testing.assert_allclose(decoupled[2] - decoupled[0], decoupled[1] - decoupled[0], rtol=1e-3)


def test_whiten_ignores_what_is_masked():
    x, _, mask = ragged(11)
    np.testing.assert_allclose(advantages.whiten(x, mask), whiten_by_loop(x, mask), atol=1e-6)
    assert not advantages.whiten(jnp.array([3.0, 5.0]), jnp.array([True, False])).any()
    assert not advantages.whiten(jnp.ones(3), jnp.zeros(3, bool)).any()


def test_integer_rewards_are_not_truncated():
    got = group_advantages(jnp.array([[0, 1, 1]]), jnp.ones((1, 3), bool), "none")
    np.testing.assert_allclose(got, [[-2 / 3, 1 / 3, 1 / 3]], atol=1e-6)


def test_equal_rewards_are_exactly_zero():
    """0.1 summed and divided in float32 is not 0.1: its rounding must not become an advantage."""
    reward, valid = jnp.full((1, 7), 0.1), jnp.ones((1, 7), bool)
    for scale in advantages.SCALES:
        assert not group_advantages(reward, valid, scale, eps=1e-12).any(), scale


def test_informative_groups():
    reward = jnp.array(
        [[1.0, 1.0, 2.0], [1.0, 1.0, 2.0], [1.0, 1.0, 1.0], [jnp.nan, 0.0, 1.0], [3.0, 0.0, 1.0]]
    )
    valid = jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0]], bool)
    assert advantages.informative_groups(reward, valid).tolist() == [True, False, False, True, False]


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="mean"):
        group_advantages(jnp.zeros((1, 2)), jnp.ones((1, 2), bool), "mean")


rewards = st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    rewards, st.floats(-5, 5), st.permutations(range(4)), st.sampled_from(sorted(advantages.SCALES))
)
def test_group_properties(reward, shift, order, scale):
    """A shift of all rewards changes nothing, a permutation permutes, the sum of a group is zero."""
    reward = np.array([reward], np.float32)
    valid = np.ones((1, 4), bool)
    if np.ptp(reward) < 1e-2:
        return
    base = np.asarray(group_advantages(reward, valid, scale))
    np.testing.assert_allclose(base.sum(), 0.0, atol=1e-4)
    np.testing.assert_allclose(group_advantages(reward[:, order], valid, scale), base[:, order], atol=1e-4)
    np.testing.assert_allclose(group_advantages(reward + np.float32(shift), valid, scale), base, atol=1e-3)


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_gae_of_a_perfect_critic_is_zero(seed, gamma, lam):
    """With V equal to the discounted return of a deterministic reward, nothing is better than expected."""
    reward, _, mask = ragged(seed, rows=3, width=6)
    value = discounted_returns(reward, mask, gamma)
    advantage, returns = gae(reward, value, mask, gamma, lam)
    np.testing.assert_allclose(advantage, 0.0, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, value, 0.0), atol=1e-5)
