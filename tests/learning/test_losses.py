"""Losses against loops in NumPy float64 on random ragged batches, and gradients against both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.learning import losses
from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.learning.losses import Columns

policy_loss = jax.jit(losses.policy_loss, static_argnums=3)


@dataclasses.dataclass
class Batch:
    """Random [B, N] arrays; the advantage is one number a row, as with group baselines."""

    seed: int
    shape: tuple[int, int] = (7, 6)

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        self.mask = np.arange(self.shape[1]) < rng.integers(0, self.shape[1] + 1, size=(self.shape[0], 1))
        self.mask[0] = True
        self.logp = -rng.exponential(size=self.shape)
        self.old = self.logp + 0.5 * rng.normal(size=self.shape)
        self.ref = self.logp + 0.5 * rng.normal(size=self.shape)
        self.entropy = rng.random(self.shape)
        self.weight = rng.random(self.shape) + 0.5
        self.advantage = np.broadcast_to(rng.normal(size=(self.shape[0], 1)), self.shape).copy()


def loss_by_loop(b, config, logp=None, width=None):
    """The objective of `policy_loss`, token by token; (loss, share of clipped tokens)."""
    logp = b.logp if logp is None else logp
    per_row, tokens, clipped = [], 0, 0
    for i, row in enumerate(b.mask):
        columns = np.flatnonzero(row)
        if not len(columns):
            continue
        terms = []
        for t in columns:
            log_ratio = logp[i, t] - b.old[i, t]
            if config.ratio == "sequence":
                log_ratio = np.mean(logp[i, columns] - b.old[i, columns])
            r, a = np.exp(log_ratio), b.advantage[i, t]
            bounded = min(max(r, 1 - config.clip_low), 1 + config.clip_high)
            value = min(r * a, bounded * a)
            if config.dual_clip and a < 0:
                value = max(value, config.dual_clip * a)
            clipped += value != r * a
            d = logp[i, t] - b.ref[i, t]
            kl = {"k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[config.kl_estimator]
            terms.append(
                -value * b.weight[i, t] + config.kl_coef * kl - config.entropy_coef * b.entropy[i, t]
            )
        tokens += len(columns)
        divide = {"token": 1, "sequence": len(columns), "constant": config.max_tokens or b.shape[1]}
        per_row.append(sum(terms) / divide[config.aggregation])
    total = sum(per_row) / (tokens if config.aggregation == "token" else len(per_row))
    return total, clipped / tokens


def ours(b, config, logp=None):
    logp = b.logp if logp is None else logp
    columns = Columns(b.advantage, b.mask, ref_logp=b.ref, is_weight=b.weight)
    return policy_loss(logp, b.old, columns, config, b.entropy)


CONFIGS = {
    "ppo": AlgorithmConfig(),
    "clip_higher": AlgorithmConfig(clip_high=0.28, entropy_coef=0.1),
    "dual_clip": AlgorithmConfig(dual_clip=1.3, clip_low=0.3),
    "grpo": AlgorithmConfig(aggregation="sequence", kl_coef=0.2),
    "dr_grpo": AlgorithmConfig(aggregation="constant", max_tokens=11, kl_coef=0.3, kl_estimator="k2"),
    "gspo": AlgorithmConfig(ratio="sequence", aggregation="sequence", clip_low=0.05, clip_high=0.1),
    "gspo_tokens": AlgorithmConfig(ratio="sequence", clip_low=0.05, clip_high=0.1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_policy_loss(name):
    for seed in range(3):
        b = Batch(seed)
        total, metrics = ours(b, CONFIGS[name])
        want, clipped = loss_by_loop(b, CONFIGS[name])
        np.testing.assert_allclose(total.value, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["loss/policy"].value, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["ratio/clipped"].value, clipped, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_policy_gradient_is_the_finite_difference(name):
    """Float64, away from kinks. For GSPO the loop differentiates s itself, ours its per-token form."""
    b, config, h = Batch(4, (4, 4)), CONFIGS[name], 1e-6
    if config.ratio == "sequence":
        b.weight[:] = b.weight[:, :1]  # as the advantage: one number a row
    with jax.enable_x64(True):
        got = jax.jit(jax.grad(lambda x: ours(b, config, x)[0].value))(jnp.asarray(b.logp))
    for index in np.ndindex(*b.shape):
        step = np.zeros(b.shape)
        step[index] = h
        want = (loss_by_loop(b, config, b.logp + step)[0] - loss_by_loop(b, config, b.logp - step)[0]) / (
            2 * h
        )
        np.testing.assert_allclose(got[index], want, atol=1e-7)


def test_gspo_with_token_advantages_weighs_each_token_with_its_own():
    """GSPO-token: the gradient of column t is -s A_t / n, not -s mean(A) / n."""
    b = Batch(6)
    b.advantage = np.random.default_rng(1).normal(size=b.shape)
    config = AlgorithmConfig(ratio="sequence", clip_low=0.99, clip_high=99.0)
    loss = lambda x: policy_loss(x, b.old, Columns(b.advantage, b.mask), config)[0].value
    length = np.maximum(b.mask.sum(-1, keepdims=True), 1)
    s = np.exp(((b.logp - b.old) * b.mask).sum(-1, keepdims=True) / length)
    want = -s * b.advantage * b.mask / b.mask.sum()
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(b.logp)), want, atol=1e-6)


def test_cispo_keeps_every_gradient_and_bounds_its_weight():
    b, config = Batch(5), AlgorithmConfig(loss="cispo", clip_low=1.0, clip_high=0.2)
    loss = lambda x: policy_loss(x, b.old, Columns(b.advantage, b.mask), config)[0].value
    weight = np.minimum(np.exp(b.logp - b.old), 1.2)
    want = -weight * b.advantage * b.mask / b.mask.sum()
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(b.logp)), want, atol=1e-6)
    np.testing.assert_allclose(loss(b.logp), np.sum(want * b.logp), rtol=1e-5, atol=1e-6)


def test_which_side_was_clipped():
    """Columns: below with A < 0, below with A > 0 (free), above with A > 0, above with A < 0 (free), dual."""
    ratio = np.array([[0.5, 0.5, 1.5, 1.5, 4.0]])
    advantage = np.array([[-1.0, 1.0, 1.0, -1.0, -1.0]])
    config = AlgorithmConfig(dual_clip=3.0)
    total, m = policy_loss(np.log(ratio), 0 * ratio, Columns(advantage, np.ones((1, 5), bool)), config)
    got = {
        name: float(m[f"ratio/{name}"].value) for name in ("clip_low", "clip_high", "clip_dual", "clipped")
    }
    assert got == pytest.approx({"clip_low": 0.2, "clip_high": 0.2, "clip_dual": 0.2, "clipped": 0.6})
    assert float(total.total) == pytest.approx(-(-0.8 + 0.5 + 1.2 - 1.5 - 3.0))


def test_on_policy_gradient_is_the_score_function():
    """Ratio 1: the gradient of every loss is -A grad logp, whatever the clip range."""
    b = Batch(8)
    for config in (AlgorithmConfig(), AlgorithmConfig(loss="cispo"), AlgorithmConfig(ratio="sequence")):
        loss = lambda x, c=config: policy_loss(x, b.logp, Columns(b.advantage, b.mask), c)[0].value
        want = -b.advantage * b.mask / b.mask.sum()
        np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(b.logp)), want, atol=1e-6)


def test_what_is_masked_counts_for_nothing():
    b = Batch(9)
    base = {name: float(m.value) for name, m in ours(b, CONFIGS["grpo"])[1].items()}
    for name in ("logp", "old", "ref", "entropy", "weight", "advantage"):
        setattr(b, name, np.where(b.mask, getattr(b, name), 17.0))
    assert {name: float(m.value) for name, m in ours(b, CONFIGS["grpo"])[1].items()} == pytest.approx(base)


def test_an_extreme_ratio_stays_finite():
    config = AlgorithmConfig(kl_coef=0.1)
    logp = jnp.array([[-200.0, -1.0]])
    old, ones = jnp.array([[-1.0, -200.0]]), jnp.ones((1, 2))
    loss = lambda x: policy_loss(x, old, Columns(-ones, ones > 0, ref_logp=old), config)[0].value
    value, grad = jax.value_and_grad(loss)(logp)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_kl_coef_of_a_controller_replaces_the_configured_one():
    b, config = Batch(3), AlgorithmConfig(kl_coef=0.5)
    columns = Columns(b.advantage, b.mask, ref_logp=b.ref)
    ones = policy_loss(b.logp, b.old, columns, dataclasses.replace(config, kl_coef=0.125))[0]
    other = policy_loss(b.logp, b.old, columns._replace(kl_coef=jnp.asarray(0.125)), config)[0]
    np.testing.assert_allclose(other.value, ones.value, rtol=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates_and_their_gradients(kind):
    """Exact expectations over a categorical policy, in closed form.

    k1, k3: unbiased. Expected gradient as a loss: k1 zero, k2 that of KL(p || q), k3 that of KL(q || p).
    """
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=5)), jnp.asarray(rng.normal(size=5))
    p, log_q = jax.nn.softmax(x), jax.nn.log_softmax(y)
    forward = lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - log_q))
    reverse = lambda x: jnp.sum(jnp.exp(log_q) * (log_q - jax.nn.log_softmax(x)))
    estimate = lambda x: losses.kl_estimate(jax.nn.log_softmax(x), log_q, kind)
    gradient = jax.grad(lambda x: jnp.sum(p * estimate(x)))(x)
    want = {"k1": jnp.zeros(5), "k2": jax.grad(forward)(x), "k3": jax.grad(reverse)(x)}[kind]
    np.testing.assert_allclose(gradient, want, atol=1e-6)
    if kind != "k2":
        np.testing.assert_allclose(jnp.sum(p * estimate(x)), forward(x), rtol=1e-5)


def test_value_loss():
    rng = np.random.default_rng(2)
    value, old, returns = rng.normal(size=(3, 5, 7))
    mask = rng.random((5, 7)) > 0.3
    for clip in (0.0, 0.5):
        want, hits = 0.0, 0
        for i, t in zip(*np.nonzero(mask), strict=True):
            free = (value[i, t] - returns[i, t]) ** 2
            kept = old[i, t] + np.clip(value[i, t] - old[i, t], -clip, clip)
            worse = max(free, (kept - returns[i, t]) ** 2) if clip else free
            hits += worse > free + 1e-9
            want += 0.5 * worse / mask.sum()
        loss, clipped = losses.value_loss(value, old, returns, mask, clip)
        np.testing.assert_allclose(loss.value, want, rtol=1e-5)
        assert int((clipped & mask).sum()) == hits


def test_value_gradient_is_the_finite_difference():
    rng = np.random.default_rng(3)
    value, old, returns = rng.normal(size=(3, 4, 3))
    mask = np.ones((4, 3), bool)
    with jax.enable_x64(True):
        loss = jax.jit(
            lambda v: losses.value_loss(v, jnp.asarray(old), jnp.asarray(returns), mask, 0.5)[0].value
        )
        got = jax.grad(loss)(jnp.asarray(value))
        for index in np.ndindex(4, 3):
            step = np.zeros((4, 3))
            step[index] = 1e-6
            want = (loss(value + step) - loss(value - step)) / 2e-6
            np.testing.assert_allclose(got[index], want, atol=1e-8)


def test_truncated_weights_and_overlong_penalty():
    trainer, sampler = np.log([0.2, 0.9, 0.5]), np.log([0.4, 0.1, 0.5])
    np.testing.assert_allclose(losses.truncated_is_weight(trainer, sampler, 2.0), [0.5, 2.0, 1.0], rtol=1e-6)
    grad = jax.grad(lambda x: losses.truncated_is_weight(x, sampler, 9.0).sum())(jnp.asarray(trainer))
    assert not grad.any()
    length = np.array([0, 60, 80, 90, 100])
    np.testing.assert_allclose(losses.soft_overlong_penalty(length, 100, 20), [0, 0, 0, -0.5, -1.0])


def test_kl_controller():
    """20 % over the target and more moves by 0.2 samples / horizon; on target nothing moves."""
    step = lambda kl: float(losses.adapt_kl_coef(jnp.asarray(0.1), jnp.asarray(kl), 0.05, 1000.0, 100))
    assert [step(0.05), step(0.055), step(5.0), step(0.0)] == pytest.approx([0.1, 0.101, 0.102, 0.098])


def bonus_for_likely_tokens(ratio, bounded, advantage, logp):
    return ratio * advantage + 2.0 * logp


def test_a_users_own_objective():
    b = Batch(1)
    config = AlgorithmConfig(loss=f"{__name__}:bonus_for_likely_tokens")
    got = policy_loss(b.logp, b.old, Columns(b.advantage, b.mask), config)[0].value
    want = -np.mean((np.exp(b.logp - b.old) * b.advantage + 2 * b.logp)[b.mask])
    np.testing.assert_allclose(got, want, rtol=1e-5)
