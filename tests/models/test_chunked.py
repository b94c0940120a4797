"""Attention in blocks of keys gives the values and gradients of attention that holds all scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.models import chunked
from gtalign_jax.models.attention import Keys, attend, visible
from gtalign_jax.models.chunked import attend_chunked

P, G, HEADS, DIM = 2, 2, 4, 8


def inputs(seed, slots, own, kv_heads, shared, dtype=jnp.float32):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    draw = lambda *shape: jax.random.normal(next(keys), shape, dtype)
    q = draw(P, G, own, HEADS, DIM)
    arrays = {"own": (draw(P, G, own, kv_heads, DIM), draw(P, G, own, kv_heads, DIM))}
    length = jax.random.randint(next(keys), (P,), 1, slots + 1)
    own_pos = length[:, None, None] + jnp.arange(own)
    masks = {"own": visible(own_pos, own_pos, None)}
    if shared:
        arrays["shared"] = (draw(P, slots, kv_heads, DIM), draw(P, slots, kv_heads, DIM))
        filled = (jnp.arange(slots) < length[:, None])[:, None, None]
        masks["shared"] = visible(own_pos, jnp.arange(slots), None) & filled
    return q, arrays, masks


def run(function, q, arrays, masks):
    keys = {name: Keys(*pair, masks[name]) for name, pair in arrays.items()}
    return function(q, keys["own"], keys.get("shared"))


@pytest.mark.parametrize(
    ("slots", "own", "kv_heads", "shared", "block"),
    [(1, 1, 1, True, 1), (5, 7, 2, True, 3), (8, 8, 4, True, 4), (5, 8, 1, False, 3), (8, 7, 2, True, 64)],
)
def test_values_equal_those_of_whole_attention(slots, own, kv_heads, shared, block):
    given_ = inputs(1, slots, own, kv_heads, shared)
    ours = run(functools.partial(attend_chunked, block=block), *given_)
    np.testing.assert_allclose(ours, run(attend, *given_), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shared", "block"), [(False, 3), (True, 3), (True, 64)])
def test_gradients_equal_those_of_whole_attention(shared, block):
    q, arrays, masks = inputs(3, 5, 7, 2, shared)
    weight = jax.random.normal(jax.random.key(9), q.shape)

    def loss(function, q, arrays):
        return jnp.sum(run(function, q, arrays, masks) * weight)

    chunked = functools.partial(attend_chunked, block=block)
    ours = jax.grad(functools.partial(loss, chunked), argnums=(0, 1))(q, arrays)
    expected = jax.grad(functools.partial(loss, attend), argnums=(0, 1))(q, arrays)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_stays_close_to_the_float64_sum():
    q, arrays, masks = inputs(4, 8, 8, 2, True, jnp.bfloat16)
    ours = run(functools.partial(attend_chunked, block=4), q, arrays, masks)
    assert ours.dtype == jnp.bfloat16
    wide = lambda x: np.asarray(x, np.float64)
    repeat = lambda x: np.repeat(x, HEADS // 2, axis=-2)
    over_group = lambda x: np.broadcast_to(x[:, None], (P, G, *x.shape[1:]))
    k, v = (
        repeat(np.concatenate([over_group(wide(arrays["shared"][i])), wide(arrays["own"][i])], 2))
        for i in (0, 1)
    )
    mask = np.concatenate([np.broadcast_to(masks[n], (P, 1, 8, 8)) for n in ("shared", "own")], -1)
    scores = np.einsum("pgnqh,pgmqh->pgqnm", wide(q), k) * DIM**-0.5
    scores = np.where(mask[:, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("pgqnm,pgmqh->pgnqh", weights, v)
    np.testing.assert_allclose(wide(ours), expected, atol=0.03)


def test_a_masked_key_has_no_part_in_values_or_gradients():
    q, arrays, masks = inputs(5, 5, 6, 2, True)
    masks["shared"] = masks["shared"].at[..., 2].set(False)

    def value(k, v):
        changed = arrays | {
            "shared": (arrays["shared"][0].at[:, 2].set(k), arrays["shared"][1].at[:, 2].set(v))
        }
        return run(functools.partial(attend_chunked, block=2), q, changed, masks).sum()

    there = jnp.full((P, 2, DIM), 50.0)
    assert value(there, there) == value(-there, -there)
    grads = jax.grad(value, argnums=(0, 1))(there, there)
    assert all((np.asarray(g) == 0).all() for g in grads)


def test_memory_is_linear_in_the_context():
    def temporaries(length):
        q = jax.ShapeDtypeStruct((1, 1, length, 2, 8), jnp.float32)
        k = jax.ShapeDtypeStruct((1, 1, length, 1, 8), jnp.float32)

        def loss(q, k, v):
            index = jnp.arange(length)
            return attend_chunked(q, Keys(k, v, visible(index, index, None)[None, None]), block=64).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
        return compiled.memory_analysis().temp_size_in_bytes - length * length  # the mask itself, 1 byte

    assert temporaries(2048) < 2.5 * temporaries(1024)


def test_long_rows_go_through_blocks_and_single_queries_do_not():
    def scans(queries, keys):
        q = jax.ShapeDtypeStruct((1, 1, queries, 2, 8), jnp.float32)
        k = jax.ShapeDtypeStruct((1, 1, keys, 1, 8), jnp.float32)
        mask = jax.ShapeDtypeStruct((1, 1, queries, keys), bool)
        return "scan" in str(
            jax.make_jaxpr(lambda q, k, v, m: chunked.attend(q, Keys(k, v, m)))(q, k, k, mask)
        )

    assert scans(1024, 1024)
    assert not scans(64, 1024)
    assert not scans(1, 2**21)
