"""Updates of adapters alone: the base is shared and stays, on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gtalign_jax.learning import gradients
from gtalign_jax.learning.algorithm import PRESETS
from gtalign_jax.learning.experience import make_experience
from gtalign_jax.learning.learner import Learner
from gtalign_jax.learning.sft import SftBatch, SftSetup, sft_update
from gtalign_jax.learning.spec import Spec
from gtalign_jax.learning.state import init_model, init_state
from gtalign_jax.learning.update import Optimizers, policy_loss_of
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, partition_spec, place_batch, spread
from gtalign_jax.models import lora
from gtalign_jax.models.heads import init_value_model
from gtalign_jax.models.lora import LoraConfig
from gtalign_jax.types import Batch, Models

LORA = LoraConfig(rank=2, alpha=4.0)
ADAM, SGD = optax.adam(0.01), optax.sgd(0.1)
# A critic, and a KL to a reference that follows every second step.
CONFIG = dataclasses.replace(
    PRESETS["ppo"], minibatches=1, kl_coef=0.1, kl_place="loss", kl_estimator="k3", reference_every=2
)


@pytest.fixture(scope="module")
def whole(params, model):
    """The one-layer model with adapters that are not zero."""
    layers = lora.init_adapters(jax.random.key(5), model, LORA)["layers"]
    for number, part in enumerate(layers.values()):
        part["lora_b"] = 0.3 * jax.random.normal(jax.random.key(number), part["lora_b"].shape)
    return lora.join(params, {"layers": layers})


@pytest.fixture(scope="module")
def learner(model):
    return Learner(Spec(model, CONFIG, temperature=0.9), Optimizers(ADAM, SGD))


def start(whole, model):
    """The state at step 0: policy, critic and reference are copies of the adapters."""
    copy = lambda: jax.tree.map(jnp.copy, lora.split(whole)[0])
    critic = init_model(init_value_model(copy(), model), SGD)
    return init_state(jax.random.key(7), init_model(copy(), ADAM), critic, reference=copy())


def two_steps(learner, state, base, batch):
    """(state, metrics) after the updates of two rollouts."""
    for _ in range(2):
        models = Models(state.policy.params, state.reference, state.critic.params, base)
        state, metrics = learner.update(state, learner.experience(models, batch), base)
    return state, metrics


def largest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)))


def host(tree):
    return jax.tree.map(np.array, tree)


def test_adapters_learn_and_the_base_stays(whole, model, learner, rollout, reward, valid):
    trained, base = lora.split(whole)
    before = host(base)
    state, metrics = two_steps(learner, start(whole, model), base, Batch(rollout, reward, valid))
    jax.tree.map(np.testing.assert_array_equal, before, base)  # neither changed nor given away
    assert jax.tree.structure(state.policy.params) == jax.tree.structure(trained)
    for params in (state.policy.params, state.critic.params["trunk"]):
        moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), params, trained)
        assert min(jax.tree.leaves(moved)) > 0, moved
    assert np.any(np.asarray(state.critic.params["head"]))
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert size(state.policy.opt_state) == 2 * size(trained) + 1  # two moments and a clock
    assert largest(state.reference, state.policy.params) == 0, "the reference has followed"
    assert float(metrics["kl/ref"].value) > 0


def test_eight_devices_are_one(whole, model, learner, rollout, reward, valid):
    """Base and adapters split over fsdp and tensor, prompts over data and fsdp: 1e-5 after two updates."""
    base = lora.split(whole)[1]
    one, metrics = two_steps(learner, start(whole, model), base, Batch(rollout, reward, valid))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    lay = lambda names, x: jax.device_put(x, NamedSharding(mesh, partition_spec(names, x.shape, mesh)))
    is_names = lambda x: isinstance(x, tuple)
    axes = lora.logical_axes(model, LORA)
    with jax.set_mesh(mesh):
        split = jax.tree.map(lay, axes, whole, is_leaf=is_names)
        assert split["layers"]["query"]["lora_b"].sharding.spec == PartitionSpec(None, None, "tensor", None)
        batch = place_batch(Batch(rollout, reward, valid), mesh)
        state = spread(start(split, model), mesh)
        many, many_metrics = two_steps(learner, state, lora.split(split)[1], batch)
    for name in ("policy", "critic"):
        got, want = getattr(many, name).params, getattr(one, name).params
        assert largest(got, want) < 1e-5, name
    value = lambda metrics: {name: float(ratio.value) for name, ratio in metrics.items()}
    assert value(many_metrics) == pytest.approx(value(metrics), abs=1e-5)


def test_the_gradient_is_the_merged_models_through_a_and_b(whole, model, rollout, reward, valid):
    """dA = s dW B^T and dB = s A^T dW, with dW the gradient of the merged model's kernel."""
    config = dataclasses.replace(PRESETS["grpo"], kl_coef=0.0)
    trained, base = lora.split(whole)
    merged = lora.merged(whole)
    merged["layers"] = {
        name: part | ({"kernel": part["kernel"][0][None]} if name in lora.TARGETS else {})
        for name, part in merged["layers"].items()
    }
    spec = Spec(model, config, temperature=0.9)
    make = jax.jit(make_experience, static_argnums=0)
    seen = make(spec, Models(trained, base=base), Batch(rollout, reward, valid))

    @jax.jit
    def gradient(params, base):
        sums = gradients.accumulate(policy_loss_of(spec, base, None), params, seen, 1)
        return gradients.mean_gradient(sums)

    ours, full = gradient(trained, base)["layers"], gradient(merged, None)["layers"]
    for name in lora.TARGETS:
        a, b = (np.asarray(trained["layers"][name][leaf][0], np.float64) for leaf in lora.TRAINED)
        a, b = a.reshape(-1, 2), b.reshape(2, -1)
        kernel = np.asarray(full[name]["kernel"], np.float64).reshape(len(a), -1)
        got_a, got_b = (np.asarray(ours[name][leaf]) for leaf in lora.TRAINED)
        np.testing.assert_allclose(got_a.reshape(a.shape), 2.0 * kernel @ b.T, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(got_b.reshape(b.shape), 2.0 * a.T @ kernel, atol=1e-5, err_msg=name)
        assert np.abs(got_a).max() > 1e-4, name


def test_the_cold_start_trains_adapters_too(whole, model, rollout):
    trained, base = lora.split(whole)
    before = host(base)
    batch = SftBatch(rollout.prompts, rollout.completions.tokens, rollout.completions.action_mask)
    setup = SftSetup(model, ADAM)
    state = init_state(jax.random.key(0), init_model(jax.tree.map(jnp.copy, trained), ADAM))
    losses = []
    for _ in range(4):
        state, metrics = sft_update(setup, state, batch, base)
        losses.append(float(metrics["loss/sft"].value))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.01
    jax.tree.map(np.testing.assert_array_equal, before, base)
