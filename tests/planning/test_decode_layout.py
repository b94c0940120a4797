"""Decoding on a mesh: weights are gathered once before the loop, rows take the context axis, tokens stay."""

import contextlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gtalign_jax.mesh.sharding import (
    MeshConfig,
    constrain,
    decode_layout,
    gather_for_decode,
    make_mesh,
    partition_spec,
    shard_tree,
)
from gtalign_jax.models import transformer
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.planning import chips, cost, hlo, programs

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    initializer_range=0.2,
)
PROMPTS, SLOTS, STEPS = 8, 4, 3
MESH = MeshConfig(fsdp=2, tensor=2, context=2)


def generate(params, prompt, length, gathered):
    """Greedy tokens [P, 1, STEPS] after prompt [P, S]; gathered: in the layout for decoding."""
    logits, prompts = transformer.prefill(params, MODEL, prompt, length)
    with decode_layout() if gathered else contextlib.nullcontext():
        if gathered:
            params = gather_for_decode(params, transformer.logical_axes(MODEL), MODEL.runtime.compute_dtype)
            keys = jax.tree.map(lambda x: constrain(x, "batch", "keys", "kv", "head_dim"), prompts.layers)
            prompts = prompts.replace(layers=keys)
        cache = transformer.init_decode_cache(MODEL, PROMPTS, 1, STEPS)
        params = transformer.split_layers(params)

        def step(t, carry):
            tokens, token, cache = carry
            tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, t, 2)
            logits, cache = transformer.decode_step(params, MODEL, token, t, prompts, cache)
            return tokens, jnp.argmax(logits, -1).astype(jnp.int32), cache

        first = jnp.argmax(logits, -1).astype(jnp.int32)[:, None]
        return jax.lax.fori_loop(0, STEPS, step, (jnp.zeros((PROMPTS, 1, STEPS), jnp.int32), first, cache))[0]


def arguments():
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, 64, (PROMPTS, SLOTS)).astype(np.int32)
    return prompt, rng.integers(1, SLOTS + 1, PROMPTS).astype(np.int32)


def test_tokens_are_those_of_one_device():
    params = jax.jit(lambda: transformer.init_params(jax.random.key(0), MODEL))()
    program = jax.jit(generate, static_argnames="gathered")
    expected = np.asarray(program(params, *arguments(), gathered=False))
    mesh = make_mesh(MESH)
    placed = jax.device_put(params, shard_tree(transformer.logical_axes(MODEL), mesh, params))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(program(placed, *arguments(), gathered=True), expected)
    assert len(np.unique(expected)) > 2


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install libtpu"
)
def test_no_step_on_a_tpu_waits_for_the_weights_split():
    # The compiler for the CPU moves such gathers out of small loops by itself; the one for TPUs does not.
    def wide(gathered: bool) -> int:
        """Collectives of a step over more than the tensor axis: over fsdp and context."""
        with jax.set_mesh(mesh):
            lowered = jax.jit(generate, static_argnames="gathered").lower(*given, gathered=gathered)
        found = cost.collectives(hlo.parse(lowered.compile().as_text(), STEPS))
        return sum(c.times == STEPS and c.group > MESH.tensor for c in found)

    mesh = make_mesh(MESH, chips.topology("v5e:2x4")[1])
    given = (programs.abstract_params(MODEL, mesh), *programs.by_prompt(arguments(), mesh))
    assert wide(gathered=False) >= MODEL.num_layers
    assert wide(gathered=True) == 0


def test_rows_take_the_context_axis_only_while_decoding():
    mesh = make_mesh(MESH)
    names, shape = ("batch", "group", "length", "width"), (8, 1, 1, 32)
    with decode_layout():
        assert partition_spec(names, shape, mesh) == P(("fsdp", "context"), None, None, None)
        assert partition_spec(("embed", "mlp"), (32, 64), mesh) == P(None, "tensor")
    assert partition_spec(names, shape, mesh) == P("fsdp", None, None, None)
    assert partition_spec(("embed", "mlp"), (32, 64), mesh) == P(("fsdp", "context"), "tensor")
