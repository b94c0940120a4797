"""Muon against a singular value decomposition; on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gtalign_jax.learning import gradients
from gtalign_jax.learning.muon import RMS, kernel_axes
from gtalign_jax.learning.state import OptimizerConfig, init_model, make_optimizer
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, shard_state, shard_tree, spread
from gtalign_jax.models import lora
from gtalign_jax.models.transformer import init_params, logical_axes
from gtalign_jax.run import checkpoint

CONFIG = OptimizerConfig(name="muon", lr=0.01, clip_norm=0.0, weight_decay=0.0)
# (in, out) of each kernel as one map
SHAPES = {"query": (16, 16), "key": (16, 8), "value": (16, 8), "output": (16, 16)}
SHAPES |= dict.fromkeys(("gate", "up", "down"), (16, 16))


def gradients_like(params):
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(3)
    return tree.unflatten([jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves])


def stepped(params, config=CONFIG, mesh=None):
    optimizer = make_optimizer(config, 4)
    model = init_model(params, optimizer)
    model = model if mesh is None else spread(model, mesh)
    step = jax.jit(lambda x: gradients.apply(x, gradients_like(params), optimizer)[0])
    return step(step(model))


def named(tree):
    paths = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in paths}


def is_kernel(path):
    return path.startswith("layers/") and path.endswith("/kernel")


def test_a_step_of_a_kernel_goes_as_far_in_every_direction(model):
    model = dataclasses.replace(model, num_layers=2)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), model)
    before, after, grads = named(params), named(stepped(params).params), named(gradients_like(params))
    kernels = [path for path in before if is_kernel(path)]
    assert [path.split("/")[1] for path in kernels] == sorted(SHAPES)
    for path in kernels:
        shape = SHAPES[path.split("/")[1]]
        move, grad = (np.reshape(x, (2, *shape)) for x in (before[path] - after[path], grads[path]))
        for moved, of in zip(move, grad, strict=True):
            u, sizes, vt = np.linalg.svd(of, full_matrices=False)
            along = u.T @ moved @ vt.T / (2 * CONFIG.lr * RMS * np.sqrt(max(shape)))
            far = np.diag(along)
            # Where five Newton-Schulz iterations end, of all directions that are not next to nothing.
            assert far[sizes > sizes[0] / 8].min() > 0.6 and far.max() < 1.3
            np.testing.assert_allclose(along, np.diag(far), atol=1e-3)


def test_what_is_no_kernel_of_a_block_is_adamws(params):
    before = named(params)
    once, twice = (named(stepped(params, dataclasses.replace(CONFIG, lr=lr)).params) for lr in (0.01, 0.02))
    others = [path for path in before if not is_kernel(path)]
    assert {"embedding", "final_norm/scale", "layers/query/bias"} <= set(others)
    for path in others:  # the first steps of Adam along a constant gradient are of the rate's length
        far, farther = jnp.abs(once[path] - before[path]), jnp.abs(twice[path] - before[path])
        np.testing.assert_allclose(far, far.ravel()[0], rtol=1e-3)
        np.testing.assert_allclose(farther, 2 * far, rtol=1e-3)


def test_adapters_are_adamws(model):
    adapters = lora.init_adapters(jax.random.key(0), model, lora.LoraConfig(rank=2))
    assert jax.tree.leaves(adapters) and not jax.tree.leaves(kernel_axes(adapters))


def test_eight_devices_make_the_steps_of_one(params):
    alone = stepped(params)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        together = stepped(params, mesh=mesh)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), alone.params, together.params
    )


def test_its_state_is_split_as_the_parameters_are(model, params):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    shardings = shard_tree(logical_axes(model), mesh)
    state = jax.eval_shape(make_optimizer(CONFIG, 4).init, params)
    split = named(shard_state(state, shardings, mesh))
    momentum = {path.split("/mu/")[1]: x for path, x in split.items() if "muon" in path and "/mu/" in path}
    assert momentum == {path: x for path, x in named(shardings).items() if is_kernel(path)}
    assert all(x.is_fully_replicated for path, x in split.items() if "ns_coeffs" in path or "count" in path)


def test_its_state_is_restored(params, tmp_path):
    manager, model = checkpoint.open_manager(tmp_path, keep=1), stepped(params)
    checkpoint.save(manager, 1, model, {})
    manager.wait_until_finished()
    restored = checkpoint.restore(manager, 1, init_model(params, make_optimizer(CONFIG, 4)))
    manager.close()
    jax.tree.map(np.testing.assert_array_equal, restored, model)
