"""The platform's kernels against whole attention: values, gradients, ragged prompts, groups and meshes."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gtalign_jax.mesh.sharding import MeshConfig, make_mesh
from gtalign_jax.models import attention, fused, transformer
from gtalign_jax.models.attention import Keys, visible
from gtalign_jax.models.config import ATTENTION, ModelConfig, RuntimeConfig
from gtalign_jax.models.splash import GroupMask
from gtalign_jax.planning import chips

P, HEADS, DIM = 2, 2, 128


def inputs(slots, group, own, kv_heads=1, prompts=P, dtype=jnp.float32):
    """Query, own and prompt keys as arrays, prompt lengths (one row full, one short)."""
    keys = iter(jax.random.split(jax.random.key(slots + own), 5))
    draw = lambda *shape: jax.random.normal(next(keys), shape, dtype)
    rows = (prompts, group, own)
    q, k, v = (draw(*rows, heads, DIM) for heads in (HEADS, kv_heads, kv_heads))
    shared = (draw(prompts, slots, kv_heads, DIM), draw(prompts, slots, kv_heads, DIM)) if slots else None
    return q, (k, v), shared, jnp.where(jnp.arange(prompts) % 2, max(slots // 3, 1), slots)


def run(function, q, own, shared, length):
    index = jnp.arange(q.shape[2])
    own = Keys(*own, visible(index, index, None)[None, None], causal=True)
    if shared is not None:
        filled = jnp.arange(shared[0].shape[1]) < length[:, None]
        shared = Keys(*shared, filled[:, None, None], length=length)
    return function(q, own, shared)


def agree(function, arrays, rtol=1e-4, atol=2e-5):
    """Values and gradients of q, own and shared keys equal those of whole attention."""
    weight = jax.random.normal(jax.random.key(9), arrays[0].shape)

    def loss(function, q, own, shared):
        out = run(function, q, own, shared, arrays[3])
        return jnp.sum(out * weight), out

    both = lambda f: jax.jit(jax.value_and_grad(functools.partial(loss, f), argnums=(0, 1, 2), has_aux=True))
    ours, expected = both(function)(*arrays[:3]), both(attention.attend)(*arrays[:3])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * max(1, np.abs(b).max()))


splash = functools.partial(fused.attend_splash, interpret=True)


@pytest.mark.parametrize(("slots", "group", "own"), [(0, 1, 130), (60, 2, 50), (128, 1, 128)])
def test_splash_has_the_values_and_gradients_of_whole_attention(slots, group, own):
    agree(splash, inputs(slots, group, own))


def test_splash_computes_each_devices_rows_and_heads():
    arrays = inputs(60, 2, 30, kv_heads=2, prompts=4)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        agree(splash, arrays)


@pytest.mark.parametrize(("slots", "group", "own"), [(0, 1, 7), (5, 2, 7)])
def test_the_librarys_attention_gets_the_same_keys_and_masks(slots, group, own):
    # cuDNN itself needs a GPU; this is the call that it gets, computed by XLA.
    agree(functools.partial(fused.attend_library, implementation="xla"), inputs(slots, group, own))


def test_the_mask_of_a_group_is_that_of_its_samples():
    slots, samples, tokens = 3, 2, 4
    mask = GroupMask((10, 13), slots, samples, tokens)
    for i in range(samples * tokens):
        for j in range(13):
            sample, token = divmod(j - slots, tokens)
            own = j >= slots and sample == i // tokens and token <= i % tokens
            assert mask[i : i + 1, j : j + 1][0, 0] == (j < slots or own), (i, j)


@pytest.mark.parametrize("kind", ATTENTION[:3])
def test_every_kind_is_the_same_attention(kind):
    agree(functools.partial(fused.attend, kind=kind), inputs(5, 2, 7))


def test_what_the_kernel_does_not_take_is_computed_all_the_same():
    q, own, shared, length = inputs(5, 2, 7)
    index = jnp.arange(7)
    windowed = Keys(*own, visible(index, index, 3)[None, None])
    assert not fused.splash_takes(q, windowed, None)
    np.testing.assert_allclose(
        fused.attend(q, windowed, kind="splash"), attention.attend(q, windowed), rtol=1e-6
    )
    causal = Keys(*own, visible(index, index, None)[None, None], causal=True)
    assert fused.splash_takes(q, causal, None)
    assert not fused.splash_takes(q[..., :64], causal, None)
    with jax.set_mesh(make_mesh(MeshConfig(context=2, fsdp=4))):
        assert not fused.splash_takes(q, causal, None)
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2, fsdp=4))):
        assert not fused.splash_takes(q, causal, None)  # one K/V head, two devices of query heads


def test_an_unknown_kind_is_refused():
    q, own, _, _ = inputs(0, 1, 2)
    with pytest.raises(ValueError, match="kind='flash': must be one of auto"):
        fused.attend(q, Keys(*own, True), kind="flash")
    with pytest.raises(ValueError, match="^attention='flash': must be one of auto"):
        RuntimeConfig(attention="flash")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install libtpu"
)
def test_splash_compiles_for_a_tpu_forward_and_backward():
    _, devices = chips.topology("v5e:2x4")
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), devices)
    arrays = jax.eval_shape(lambda: inputs(128, 2, 256, kv_heads=2, prompts=8, dtype=jnp.bfloat16))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), arrays)
    loss = lambda *a: run(fused.attend_splash, *a).astype(jnp.float32).sum()
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*placed).compile().as_text()
    kernels = {name for name in ("fwd", "dq", "dkv") if f"splash_mha_{name}" in text}
    assert kernels == {"fwd", "dq", "dkv"}, kernels


@pytest.mark.parametrize("window", [0, 3])
def test_the_switch_of_a_model_reaches_the_kernel(monkeypatch, window):
    calls = []
    interpreted = lambda *args: calls.append(args[0].shape[2]) or splash(*args)
    monkeypatch.setattr(fused, "attend_splash", interpreted)
    config = ModelConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=1,
        head_dim=DIM, window=window, window_layers=(True, True) * bool(window),
        runtime=RuntimeConfig(scan_layers=False),
    )  # fmt: skip
    params = transformer.init_params(jax.random.key(0), config)
    prompt, completion = (
        jax.random.randint(jax.random.key(i), shape, 1, 50) for i, shape in enumerate([(2, 4), (2, 2, 6)])
    )
    computed = lambda kind: dataclasses.replace(
        config, runtime=dataclasses.replace(config.runtime, attention=kind)
    )
    hidden = lambda kind: transformer.forward_shared(
        params, computed(kind), prompt, jnp.array([4, 2]), completion
    )
    np.testing.assert_allclose(hidden("splash"), hidden("xla"), atol=1e-4)
    # The prompt on itself, whose last layer has one query; and the completions on both.
    assert calls == ([] if window else [4, 6, 6])
