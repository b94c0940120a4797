"""Products, the gated activation and attention against PyTorch: values and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gtalign_jax.models.attention import Keys, attend
from gtalign_jax.models.products import gated, project

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def normal(shape, seed, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.dtype(dtype))


def as_torch(x):
    """A leaf with a gradient."""
    x = np.asarray(x)
    tensor = torch.from_numpy(x.astype(np.float32))
    return tensor.to(getattr(torch, x.dtype.name)).detach().requires_grad_()


def ours_and_theirs(ours, theirs, arrays, seed=9):
    """(values, gradients) of both under one random gradient of the output."""
    shape = jax.eval_shape(ours, *arrays)
    slope = normal(shape.shape, seed, shape.dtype)

    @jax.jit
    def value_and_gradients(slope, *arrays):
        value, pullback = jax.vjp(ours, *arrays)
        return [value, *pullback(slope)]

    leaves = [as_torch(x) for x in arrays]
    expected = theirs(*leaves)
    expected.backward(as_torch(slope).detach())
    return value_and_gradients(slope, *arrays), [expected.detach(), *(x.grad for x in leaves)]


def assert_close(ours, theirs, dtype):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == jnp.dtype(dtype)
        a, b = np.asarray(a, np.float32), b.float().numpy()
        np.testing.assert_allclose(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * np.abs(b).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("x", "kernel", "inputs"),
    [
        ((2, 3, 4, 6), (6, 10), 1),
        ((2, 3, 4, 10), (10, 6), 1),
        ((2, 1, 3, 5), (5, 2, 4), 1),
        ((2, 3, 2, 4), (2, 4, 5), 2),
    ],
    ids=["wider", "narrower", "into heads", "from heads"],
)
def test_a_projection(x, kernel, inputs, bias, dtype):
    out = kernel[inputs:]
    arrays = [normal(x, 0, dtype), normal(kernel, 1, dtype)] + [normal(out, 2, dtype)] * bias

    def theirs(x, kernel, bias=0):
        return torch.tensordot(x, kernel, inputs) + bias

    assert_close(*ours_and_theirs(lambda x, w, b=None: project(x, w, b, inputs), theirs, arrays), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gated_activation(dtype):
    arrays = [3 * normal((4, 7), 0, dtype), normal((4, 7), 1, dtype)]
    theirs = lambda gate, up: torch.nn.functional.silu(gate) * up
    assert_close(*ours_and_theirs(gated, theirs, arrays), dtype)


def test_the_gated_activation_far_out():
    d_gate, d_up = jax.grad(lambda g, u: gated(g, u).sum(), (0, 1))(jnp.array([-1e4, 1e4]), jnp.ones(2))
    np.testing.assert_array_equal(d_gate, [0, 1])
    np.testing.assert_array_equal(d_up, [0, 1e4])


@pytest.mark.parametrize("queries", [1, 4], ids=["a decode step", "a row"])
@pytest.mark.parametrize("group", [1, 3])
def test_attention_over_a_prompt_and_a_row(group, queries):
    p, s, heads, kv, dim = 2, 5, 4, 2, 8
    length, slots = np.array([5, 3]), 4
    q = normal((p, group, queries, heads, dim), 0)
    prompt = [normal((p, s, kv, dim), i) for i in (1, 2)]
    own = [normal((p, group, slots, kv, dim), i) for i in (3, 4)]
    in_prompt = np.broadcast_to((np.arange(s) < length[:, None])[:, None, None], (p, 1, queries, s))
    in_own = (np.arange(slots) <= np.arange(slots - queries, slots)[:, None])[None, None]

    def ours(q, pk, pv, k, v):
        return attend(q, Keys(k, v, jnp.asarray(in_own)), Keys(pk, pv, jnp.asarray(in_prompt)))

    def theirs(q, pk, pv, k, v):
        whole = lambda old, new: torch.cat([old[:, None].expand(p, group, *old.shape[1:]), new], dim=2)
        by_head = lambda x: x.permute(0, 1, 3, 2, 4).repeat_interleave(heads // x.shape[3], dim=2)
        shape = (p, group, queries)
        mask = np.concatenate(
            [np.broadcast_to(in_prompt, (*shape, s)), np.broadcast_to(in_own, (*shape, slots))], axis=-1
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            by_head(q), by_head(whole(pk, k)), by_head(whole(pv, v)), torch.from_numpy(mask)[:, :, None]
        )
        return out.permute(0, 1, 3, 2, 4)

    assert_close(*ours_and_theirs(ours, theirs, [q, *prompt, *own]), "float32")


def test_a_query_that_sees_nothing_has_no_gradient_through_its_scores():
    q, k = jnp.asarray(normal((1, 1, 2, 2, 4), 0)), jnp.asarray(normal((1, 1, 3, 2, 4), 1))
    mask = jnp.zeros((1, 1, 2, 3), bool).at[0, 0, 1].set(True)
    d_q = jax.grad(lambda q: (attend(q, Keys(k, k, mask)) ** 2).sum())(q)
    assert not np.any(d_q[0, 0, 0]) and np.all(d_q[0, 0, 1] != 0)
