"""One table, any mesh: eight fake devices in every split give what one device gives."""

import dataclasses
import itertools
import math
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gtalign_jax.errors import UserError
from gtalign_jax.learning.logprobs import token_logprobs
from gtalign_jax.learning.vocabulary import Head
from gtalign_jax.mesh import sharding
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, partition_spec, shard_state, shard_tree, spread
from gtalign_jax.models import transformer
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generate
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.sampling import GREEDY
from gtalign_jax.types import PromptBatch

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    initializer_range=0.2,
)
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(tensor=2, fsdp=4),
    "tensor over more than the kv heads": MeshConfig(tensor=4, data=2),
    "context": MeshConfig(context=4, fsdp=2),
    "all": MeshConfig(data=1, fsdp=2, tensor=2, context=2),
}
if os.environ.get("GTALIGN_EVERY_MESH"):  # all twenty splits: minutes, so only when asked for
    splits = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) == 8]
    MESHES = {str(sizes): MeshConfig(*sizes) for sizes in splits}
PROMPTS, GROUP, SLOTS, NEW = 8, 2, 8, 8


def batch():
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, 64, (PROMPTS, SLOTS)).astype(np.int32)
    length = rng.integers(1, SLOTS + 1, PROMPTS).astype(np.int32)
    completion = rng.integers(1, 64, (PROMPTS, GROUP, NEW)).astype(np.int32)
    mask = np.arange(NEW) < rng.integers(1, NEW + 1, (PROMPTS, GROUP, 1))
    return prompt, length, completion, mask


@jax.jit
def loss_and_gradients(params, prompt, length, completion, mask):
    def loss(params):
        prompts = PromptBatch(prompt, length)
        logp, entropy = token_logprobs(params, MODEL, prompts, completion, Head(chunk=3))
        return jnp.sum(jnp.where(mask, -logp + 0.1 * entropy, 0.0)) / jnp.sum(mask)

    return jax.value_and_grad(loss)(params)


def on_mesh(config: MeshConfig):
    mesh = make_mesh(config)
    shapes = jax.eval_shape(lambda: transformer.init_params(jax.random.key(0), MODEL))
    shardings = shard_tree(transformer.logical_axes(MODEL), mesh, shapes)
    params = jax.jit(lambda: transformer.init_params(jax.random.key(0), MODEL))()
    return mesh, jax.device_put(params, shardings)


def greedy(mesh, params):
    engine = Engine(None, MODEL, (0,), GREEDY, BucketConfig(prompt=(SLOTS,), completion=(NEW,)), mesh)
    prompt, length, _, _ = batch()
    prompts = engine_lib.prompt_batch(engine, [row[:n] for row, n in zip(prompt, length, strict=True)])
    request = Request(prompts, jax.random.key(1), GROUP, NEW)
    return jax.device_get(generate.rollout(engine, params, request))


@pytest.fixture(scope="module")
def single():
    mesh, params = on_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        value, grads = loss_and_gradients(params, *sharding.place_batch(batch(), mesh))
    return np.asarray(value), jax.device_get(grads), greedy(mesh, params)


@pytest.mark.parametrize("name", MESHES)
def test_every_split_gives_the_loss_gradients_and_tokens_of_one_device(name, single):
    mesh, params = on_mesh(MESHES[name])
    with jax.set_mesh(mesh):
        value, grads = loss_and_gradients(params, *sharding.place_batch(batch(), mesh))
    np.testing.assert_allclose(value, single[0], rtol=1e-5)
    for ours, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(single[1]), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    rollout = greedy(mesh, params)
    written, expected = rollout.completions, single[2].completions
    np.testing.assert_array_equal(written.tokens, expected.tokens)
    np.testing.assert_allclose(written.logp, expected.logp, atol=1e-5)


def test_parameters_and_moments_are_split_not_copied():
    mesh, params = on_mesh(MeshConfig(fsdp=4, tensor=2))
    optimizer = optax.adamw(1e-3)
    placed = jax.tree.map(lambda x: x.sharding, params)
    where = shard_state(jax.eval_shape(optimizer.init, params), placed, mesh)
    state = spread(jax.jit(optimizer.init, out_shardings=where)(params), mesh)
    big = [x for x in jax.tree.leaves((params, state)) if x.size >= 1024]
    assert len(big) >= 3 * 7
    for leaf in big:
        shard = leaf.addressable_shards[0].data
        assert shard.size * 8 == leaf.size, (leaf.shape, leaf.sharding)
    for leaf in jax.tree.leaves(state):
        assert len(leaf.sharding.device_set) == 8


def test_the_table_in_partition_specs():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))
    assert partition_spec(("vocab", "embed"), (64, 32), mesh) == P("tensor", ("fsdp", "context"))
    assert partition_spec(("batch", "group"), (1, 2), mesh) == P(None, "fsdp")
    assert partition_spec((None, "mlp"), (7, 64), mesh) == P(P.UNCONSTRAINED, "tensor")
    with pytest.raises(UserError, match="'colour' has no rule"):
        partition_spec(("colour",), (8,), mesh)


def test_what_does_not_divide_is_refused_by_name_except_kv_heads():
    mesh = make_mesh(MeshConfig(tensor=4, fsdp=2))
    odd = dataclasses.replace(MODEL, intermediate_size=66)
    shapes = jax.eval_shape(lambda: transformer.init_params(jax.random.key(0), odd))
    with pytest.raises(UserError, match=r"mesh axis tensor \(4\) does not divide mlp \(66\)"):
        shard_tree(transformer.logical_axes(odd), mesh, shapes)
    shapes = jax.eval_shape(lambda: transformer.init_params(jax.random.key(0), MODEL))
    placed = shard_tree(transformer.logical_axes(MODEL), mesh, shapes)
    assert placed["layers"]["key"]["kernel"].spec == P(None, "fsdp", None, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(fsdp=-1, tensor=3), "3 does not divide the 8 devices"),
        (MeshConfig(fsdp=16), "needs 16 devices, 8 are here"),
        (MeshConfig(slices=3, fsdp=-1), "does not divide"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": -1, "data": -1}, "fsdp=-1: at most one of data, fsdp, tensor, context is -1, and data is"),
        ({"tensor": 0}, "tensor=0: must be at least 1"),
        ({"slices": -1}, "slices=-1: must be at least 1"),
    ],
)
def test_sizes_that_no_mesh_has_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**sizes)


def test_one_axis_takes_the_devices_that_are_left():
    assert dict(make_mesh(MeshConfig(fsdp=-1, tensor=2)).shape) == {
        "data": 1,
        "fsdp": 4,
        "tensor": 2,
        "context": 1,
    }
    assert make_mesh(MeshConfig(fsdp=-1)).shape["fsdp"] == 8


def test_a_mesh_that_leaves_a_process_without_devices_is_refused(monkeypatch):
    devices = [types.SimpleNamespace(process_index=i // 4) for i in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(UserError, match=r"takes 4 of 8 devices, none of process 1; .* config.mesh.fsdp=-1"):
        make_mesh(MeshConfig(data=2, tensor=2))


def test_an_optimizer_leaf_that_belongs_to_nothing_is_refused():
    mesh = make_mesh(MeshConfig(fsdp=8))
    with pytest.raises(UserError, match="belongs to no parameter"):
        shard_state({"x": jax.ShapeDtypeStruct((4,), jnp.float32)}, {"w": NamedSharding(mesh, P())}, mesh)
