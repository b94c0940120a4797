"""Chunked log-probabilities and entropies against float64 sums over the whole vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.learning import logprobs, vocabulary
from gtalign_jax.learning.vocabulary import Head
from gtalign_jax.models.config import ModelConfig

P, G, N, D, V = 2, 3, 5, 8, 23
CONFIG = ModelConfig(vocab_size=V, hidden_size=D)


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    table = jax.random.normal(keys[0], (V, D))
    hidden = jax.random.normal(keys[1], (P, G, N, D), dtype)
    tokens = jax.random.randint(keys[2], (P, G, N), 0, V)
    return table, hidden, tokens, jax.random.normal(keys[3], (2, P, G, N))


def score(table, hidden, tokens, temperature, chunk):
    scored = logprobs._scores({"embedding": table}, CONFIG, hidden, tokens, Head(temperature, chunk))
    return scored.logp, scored.entropy


def whole(table, hidden, tokens, temperature):
    """(log p, entropy, p) with all logits at once, in float64."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T / temperature
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logp, np.asarray(tokens)[..., None], -1)[..., 0]
    return chosen, -(np.exp(logp) * logp).sum(-1), logp


@pytest.mark.parametrize("chunk", [1, 7, 30, 1024])
def test_values_and_gradients_are_those_of_the_whole_vocabulary(chunk):
    table, hidden, tokens, weight = inputs()
    total = lambda table, hidden: sum(
        jnp.sum(w * x) for w, x in zip(weight, score(table, hidden, tokens, 0.7, chunk), strict=True)
    )
    logp, entropy = jax.jit(functools.partial(score, temperature=0.7, chunk=chunk))(table, hidden, tokens)
    expected_logp, expected_entropy, all_logp = whole(table, hidden, tokens, 0.7)
    np.testing.assert_allclose(logp, expected_logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    d_table, d_hidden = jax.jit(jax.grad(total, argnums=(0, 1)))(table, hidden)
    p, w = np.exp(all_logp), np.asarray(weight, np.float64)[..., None]
    d_logits = w[0] * (np.eye(V)[np.asarray(tokens)] - p) - w[1] * p * (
        all_logp + expected_entropy[..., None]
    )
    d_logits /= 0.7
    np.testing.assert_allclose(d_hidden, d_logits @ np.asarray(table, np.float64), rtol=1e-4, atol=1e-5)
    by_word = np.einsum("pgnv,pgnd->vd", d_logits, np.asarray(hidden, np.float64))
    np.testing.assert_allclose(d_table, by_word, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_the_gradient_of_a_loss_by_token(chunk):
    """Of sum_i a_i (log p_i)^2 + b_i H_i, three times over, which the loss's own pass does not know."""
    table, hidden, tokens, (a, b) = inputs()
    loss = lambda logp, entropy, columns: columns[0] * logp**2 + columns[1] * entropy
    objective, head = logprobs.Objective(loss, (a, b)), Head(0.7, chunk)

    def scored(table, hidden):
        return logprobs._scores({"embedding": table}, CONFIG, hidden, tokens, head, None, objective)

    found = jax.jit(scored)(table, hidden)
    logp, entropy, all_logp = whole(table, hidden, tokens, 0.7)
    total = (np.asarray(a, np.float64) * logp**2 + np.asarray(b, np.float64) * entropy).sum()
    np.testing.assert_allclose(found.total, total, rtol=1e-5)
    np.testing.assert_allclose(found.logp, logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-5, atol=1e-5)
    value, slopes = jax.jit(jax.value_and_grad(lambda *of: 3 * scored(*of).total, argnums=(0, 1)))(
        table, hidden
    )
    np.testing.assert_allclose(value, 3 * total, rtol=1e-5)
    p, d_logp, d_entropy = np.exp(all_logp), 3 * 2 * np.asarray(a) * logp, 3 * np.asarray(b, np.float64)
    d_logits = d_logp[..., None] * (np.eye(V)[np.asarray(tokens)] - p)
    d_logits -= d_entropy[..., None] * p * (all_logp + entropy[..., None])
    d_logits /= 0.7
    by_word = np.einsum("pgnv,pgnd->vd", d_logits, np.asarray(hidden, np.float64))
    np.testing.assert_allclose(slopes[0], by_word, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(slopes[1], d_logits @ np.asarray(table, np.float64), rtol=1e-4, atol=1e-4)


def test_sums_over_a_real_vocabulary_keep_float32_precision():
    logits = 2 * jax.random.normal(jax.random.key(3), (1, 4, 151936))
    weights = np.exp(np.asarray(logits, np.float64))
    tokens = jnp.array([[0, 1, 75968, 151935]], jnp.int32)
    for sums in (vocabulary._sums, vocabulary._sums_whole):
        total, weighted, chosen = jax.jit(sums)(logits, jnp.zeros((1, 4, 1)), tokens)
        np.testing.assert_allclose(total, weights.sum(-1), rtol=2e-6)
        np.testing.assert_allclose(weighted, (weights * np.asarray(logits, np.float64)).sum(-1), rtol=5e-6)
        np.testing.assert_array_equal(
            chosen, np.asarray(logits)[0, np.arange(4), np.asarray(tokens)[0]][None]
        )


def test_bfloat16_gradients_of_the_table_are_summed_in_float32():
    table, hidden, tokens, weight = inputs(jnp.bfloat16)
    loss = lambda table, chunk: jnp.sum(weight[0] * score(table, hidden, tokens, 1.0, chunk)[0])
    gradient = lambda chunk: jax.jit(jax.grad(functools.partial(loss, chunk=chunk)))
    one_by_one, at_once = (np.asarray(gradient(chunk)(table)) for chunk in (1, 30))
    assert one_by_one.dtype == np.float32
    np.testing.assert_allclose(one_by_one, at_once, atol=1e-5)


@pytest.mark.parametrize("known", [False, True], ids=["of results", "by token"])
def test_logits_of_one_chunk_exist_at_a_time(known):
    def total(table, hidden, given, chunk):
        if not known:
            return sum(x.sum() for x in score(table, hidden, given, 1.0, chunk))
        objective = logprobs.Objective(lambda logp, entropy, _: logp + entropy, ())
        head = Head(1.0, chunk)
        return logprobs._scores({"embedding": table}, CONFIG, hidden, given, head, None, objective).total

    def temporaries(tokens, vocabulary=4096, chunk=64):
        table = jax.ShapeDtypeStruct((vocabulary, 16), jnp.float32)
        hidden = jax.ShapeDtypeStruct((1, 1, tokens, 16), jnp.float32)
        given = jax.ShapeDtypeStruct((1, 1, tokens), jnp.int32)
        gradient = jax.jit(jax.grad(functools.partial(total, chunk=chunk), argnums=(0, 1)))
        return gradient.lower(table, hidden, given).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(2048)
    assert short < 4 * (64 + 2 * 16) * 4096 * 4  # a few chunks of logits, the table and its gradient
    assert long - short < 1024 * 16 * 4 * 8  # more tokens cost their states, not their logits
