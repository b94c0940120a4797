"""Sampling draws exactly from the distribution its settings define."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gtalign_jax.rollout.sampling import (
    GREEDY,
    SamplingConfig,
    processed_logits,
    row_keys,
    sample_token,
    token_uniform,
)

SETTINGS = (
    SamplingConfig(),
    SamplingConfig(temperature=0.6),
    SamplingConfig(temperature=1.7, top_k=20),
    SamplingConfig(top_p=0.8),
    SamplingConfig(min_p=0.1),
    SamplingConfig(temperature=0.7, top_k=50, top_p=0.9, min_p=0.02),
)
VOCAB = 300


def _logits(seed: int = 0, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, VOCAB)).astype(np.float32) * 2


def _expected(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """The distribution by its definition: sort one row in float64 and keep what the filters keep."""
    z = logits.astype(np.float64) / config.temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = np.argsort(-p)
    if config.top_k:
        p[order[config.top_k :]] = 0
        p /= p.sum()
    mass, keep = 0.0, np.zeros(VOCAB, bool)
    for v in order:
        keep[v] = mass < config.top_p
        mass += p[v]
    keep &= p >= config.min_p * p.max()
    p = np.where(keep, p, 0)
    return p / p.sum()


def _draw(config: SamplingConfig, n: int) -> tuple[np.ndarray, np.ndarray]:
    keys = row_keys(jax.random.key(1), jnp.arange(n))
    uniform = token_uniform(keys, jnp.int32(3))
    logits = jnp.broadcast_to(_logits(), (n, VOCAB))
    token, logp = jax.jit(sample_token, static_argnums=2)(uniform, logits, config)
    return np.asarray(token), np.asarray(logp)


@pytest.mark.parametrize("config", SETTINGS)
def test_processed_logits_are_the_defined_distribution(config):
    logits = _logits(rows=5)
    ours = jax.nn.softmax(processed_logits(jnp.asarray(logits), config), axis=-1)
    for row, p in zip(logits, ours, strict=True):
        np.testing.assert_allclose(p, _expected(row, config), atol=1e-6)


@pytest.mark.parametrize("config", SETTINGS)
def test_frequencies_pass_a_chi_square_test(config):
    n = 40_000
    token, logp = _draw(config, n)
    p = _expected(_logits()[0], config)
    count = np.bincount(token, minlength=VOCAB)
    assert not count[p == 0].any()
    common = p * n >= 5
    observed = np.append(count[common], count[~common].sum())
    expected = np.append(p[common], p[~common].sum()) * n
    keep = expected > 0
    assert scipy.stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3
    np.testing.assert_allclose(logp, np.log(p[token]), atol=1e-5)


def test_frequencies_under_the_repetition_penalty_pass_a_chi_square_test():
    n, config = 40_000, SamplingConfig(temperature=0.8, repetition_penalty=1.7)
    seen = np.arange(VOCAB) % 3 == 0
    logits = _logits()[0]
    uniform = token_uniform(row_keys(jax.random.key(2), jnp.arange(n)), jnp.int32(0))
    draw = jax.jit(lambda u: sample_token(u, jnp.broadcast_to(logits, (n, VOCAB)), config, jnp.asarray(seen)))
    token, logp = draw(uniform)
    p = _expected(np.where(seen, np.where(logits > 0, logits / 1.7, logits * 1.7), logits), config)
    common = p * n >= 5
    count = np.bincount(np.asarray(token), minlength=VOCAB)
    observed, expected = (np.append(x[common], x[~common].sum()) for x in (count, p * n))
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3
    np.testing.assert_allclose(logp, np.log(p[np.asarray(token)]), atol=1e-5)


def test_every_quantile_maps_to_the_inverse_cdf():
    logits = _logits()
    p = _expected(logits[0], SamplingConfig())
    uniform = np.linspace(0.0005, 0.9995, 1000).astype(np.float32)
    token, _ = sample_token(jnp.asarray(uniform), jnp.broadcast_to(logits, (1000, VOCAB)), SamplingConfig())
    cdf = np.cumsum(p)
    before = np.append(0, cdf[:-1])
    assert (uniform < cdf[token] + 1e-6).all() and (uniform >= before[token] - 1e-6).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1.0])
def test_a_token_of_probability_zero_is_never_drawn(uniform):
    """Zeros at both ends of the vocabulary, of a block, and whole blocks of zeros."""
    logits = np.full((4, VOCAB), -np.inf, np.float32)
    logits[0, 7] = logits[1, 130:140] = logits[2, [0, 299]] = 0
    logits[3, 127:129] = -1e4, 3.0
    token, logp = sample_token(jnp.full(4, uniform), jnp.asarray(logits), SamplingConfig())
    assert np.isfinite(np.asarray(logp)).all()
    assert token[0] == 7 and 130 <= token[1] < 140 and token[2] in (0, 299) and token[3] == 128


def test_greedy_is_the_argmax_with_its_probability_at_temperature_one():
    logits = _logits(rows=6)
    token, logp = sample_token(jnp.zeros(6), jnp.asarray(logits), GREEDY)
    np.testing.assert_array_equal(token, logits.argmax(-1))
    np.testing.assert_allclose(logp, jax.nn.log_softmax(logits).max(-1), atol=1e-6)


def test_the_repetition_penalty_touches_seen_tokens_only():
    logits = jnp.asarray([[2.0, -2.0, 1.0, -1.0]])
    seen = jnp.asarray([[True, True, False, False]])
    config = SamplingConfig(repetition_penalty=2.0)
    np.testing.assert_allclose(processed_logits(logits, config, seen), [[1.0, -4.0, 1.0, -1.0]])


def test_the_draw_of_a_row_does_not_depend_on_its_batch():
    key = jax.random.key(7)
    alone = token_uniform(row_keys(key, jnp.asarray([5])), jnp.int32(2))
    grid = token_uniform(row_keys(key, jnp.arange(12).reshape(3, 4)), jnp.int32(2))
    assert alone[0] == grid[1, 1]
    assert len(np.unique(grid)) == 12


@pytest.mark.parametrize("field", [{"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"top_k": -1}])
def test_a_setting_out_of_range_is_named(field):
    (name, value), *_ = field.items()
    with pytest.raises(ValueError, match=f"^{name}={value}: must be "):
        SamplingConfig(**field)
