"""Optimizers as configured, and states that can be donated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gtalign_jax.learning import gradients
from gtalign_jax.learning.state import OptimizerConfig, init_model, init_state, make_optimizer
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, spread
from gtalign_jax.run import checkpoint
from gtalign_jax.types import Completions


def rates(config, steps):
    """The step sizes actually taken: with a constant gradient, Adam moves by the learning rate."""
    optimizer = make_optimizer(config, steps)

    def step(carry, _):
        params, opt_state = carry
        updates, opt_state = optimizer.update(jnp.ones(1), opt_state, params)
        return (params + updates, opt_state), -updates[0]

    return jax.lax.scan(step, (jnp.zeros(1), optimizer.init(jnp.zeros(1))), None, length=steps)[1]


def test_constant_with_warmup():
    got = rates(OptimizerConfig(lr=0.1, warmup=4, clip_norm=0.0), 8)
    np.testing.assert_allclose(got, 0.1 * np.minimum(np.arange(8) / 4, 1.0), rtol=1e-4, atol=1e-8)


def test_cosine_ends_at_a_tenth():
    got = rates(OptimizerConfig(lr=0.1, schedule="cosine", clip_norm=0.0), 9)
    want = 0.1 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(9) / 9)))
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_cosine_ends_where_it_should():
    got = rates(OptimizerConfig(lr=0.1, schedule="cosine", final=0.0, clip_norm=0.0), 9)
    np.testing.assert_allclose(got, 0.05 * (1 + np.cos(np.pi * np.arange(9) / 9)), rtol=1e-4)


def test_decay_of_matrices_only():
    params = {"matrix": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimizer = make_optimizer(OptimizerConfig(lr=0.1, weight_decay=0.5), 1)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -0.05 * np.ones((2, 2)), rtol=1e-6)
    assert not updates["bias"].any()


@pytest.mark.parametrize(
    "fields",
    [
        dict(schedule="linear"),
        dict(lr=0.0),
        dict(name="sgd"),
        dict(offload=True, name="muon"),
        dict(eps=1e-6, name="muon"),
    ],
)
def test_wrong_settings_are_refused(fields):
    with pytest.raises(ValueError, match=f"^{next(iter(fields))}="):
        OptimizerConfig(**fields)


def test_a_plain_state_and_one_with_slow_parts():
    params, sgd = {"w": jnp.ones((2, 2))}, optax.sgd(0.1)
    plain = init_state(jax.random.key(0), init_model(params, sgd))
    assert plain.critic is None and int(plain.step) == 0
    assert plain.kl_coef is None and plain.reference is None and plain.waiting is None
    model, waiting = init_model(params, sgd), Completions(*[np.zeros((1, 1, 1))] * 5)
    state = init_state(jax.random.key(0), model, model, kl_coef=0.25, reference=params, waiting=waiting)
    assert float(state.kl_coef) == 0.25 and state.kl_coef.dtype == jnp.float32
    assert state.reference["w"] is not params["w"]
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state.waiting))


def test_the_reference_in_a_state_survives_donation():
    params, sgd = {"w": jnp.ones((2, 2))}, optax.sgd(0.1)
    state = init_state(jax.random.key(0), init_model(params, sgd), reference=params)
    step = jax.jit(lambda s: s.replace(policy=jax.tree.map(lambda x: x + 1, s.policy)), donate_argnums=0)
    state = step(step(state))
    np.testing.assert_array_equal(state.policy.params["w"], 3.0)
    np.testing.assert_array_equal(state.reference["w"], 1.0)


# --- moments in the host's memory ---------------------------------------------------------------

SPLIT = PartitionSpec("fsdp")


def stepped(offload, steps=3):
    """(a model on eight devices after some steps, compilations)."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    optimizer = make_optimizer(OptimizerConfig(lr=0.1, offload=offload), steps)
    params = {"w": jax.device_put(jnp.arange(16.0).reshape(8, 2), NamedSharding(mesh, SPLIT))}
    model = spread(init_model(params, optimizer), mesh)
    step = jax.jit(
        lambda x: gradients.apply(x, jax.tree.map(jnp.cos, x.params), optimizer)[0], donate_argnums=0
    )
    for _ in range(steps):
        model = step(model)
    return model, step._cache_size()


def moments(model):
    return [x for x in jax.tree.leaves(model.opt_state) if x.ndim]


def test_moments_in_host_memory_change_nothing_but_their_place():
    (there, compiled), (here, _) = stepped(True), stepped(False)
    assert compiled == 1
    assert len(moments(there)) == 2
    for x in moments(there):
        assert x.sharding.memory_kind == "pinned_host" and x.sharding.spec == SPLIT
    assert {x.sharding.memory_kind for x in moments(here)} == {"device"}
    np.testing.assert_array_equal(there.params["w"], here.params["w"])
    for x, y in zip(jax.tree.leaves(there.opt_state), jax.tree.leaves(here.opt_state), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_streamed_step_that_is_not_finite_changes_nothing():
    optimizer = make_optimizer(OptimizerConfig(lr=0.1, offload=True), 1)
    model = init_model({"a": jnp.ones((2, 2)), "b": jnp.ones(3)}, optimizer)
    grads = {"a": jnp.ones((2, 2)), "b": jnp.array([1.0, jnp.nan, 1.0])}
    after, metrics = jax.jit(lambda x: gradients.apply(x, grads, optimizer))(model)
    jax.tree.map(np.testing.assert_array_equal, after, model)
    assert metrics["update/skipped"].value == 1.0


def test_a_restored_state_waits_in_host_memory_again(tmp_path):
    model, _ = stepped(True, 1)
    manager = checkpoint.open_manager(tmp_path, keep=1)
    checkpoint.save(manager, 1, model, {})
    manager.wait_until_finished()
    restored = checkpoint.restore(manager, 1, stepped(True, 0)[0])
    manager.close()
    jax.tree.map(np.testing.assert_array_equal, restored, model)
    assert {x.sharding.memory_kind for x in moments(restored)} == {"pinned_host"}
