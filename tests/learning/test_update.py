"""The update step on a one-layer model: parts, devices, clocks and brakes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gtalign_jax.errors import UserError
from gtalign_jax.learning import gradients
from gtalign_jax.learning.algorithm import PRESETS, AlgorithmConfig
from gtalign_jax.learning.learner import Learner
from gtalign_jax.learning.logprobs import token_logprobs
from gtalign_jax.learning.losses import aggregate
from gtalign_jax.learning.spec import Spec
from gtalign_jax.learning.state import init_model, init_state
from gtalign_jax.learning.step_losses import policy_step_loss, value_step_loss
from gtalign_jax.learning.update import Optimizers, minibatch_rows
from gtalign_jax.learning.vocabulary import Head
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh
from gtalign_jax.models.heads import init_value_model
from gtalign_jax.types import Batch, Models

SGD = optax.sgd(optax.constant_schedule(0.1))  # a schedule counts the steps that were taken
GRPO = PRESETS["grpo"]
# Its first step trains the critic alone.
PPO = dataclasses.replace(PRESETS["ppo"], minibatches=2, kl_coef=0.1, critic_warmup=1)
# Its mini-batches stop at a KL that the first one's step exceeds.
SLOW = AlgorithmConfig(
    kl_coef=0.1, kl_target=1e-6, kl_horizon=160, reference_every=2, minibatches=4, kl_stop=1e-6
)


@pytest.fixture(scope="module")
def setting(model, params, reference, rollout, reward, valid):
    """start(config) -> (fresh state, its experience, update); one compilation a config."""
    copy = lambda tree: jax.tree.map(jnp.copy, tree)

    @functools.cache
    def learning(config):
        learner = Learner(Spec(model, config, temperature=0.9), Optimizers(SGD, SGD))
        value = init_value_model(params, model) if config.needs_critic else None
        seen = learner.experience(Models(params, reference, value), Batch(rollout, reward, valid))
        return seen, learner.update

    def start(config, **slow):
        critic = init_model(init_value_model(copy(params), model), SGD) if config.needs_critic else None
        state = init_state(jax.random.key(7), init_model(copy(params), SGD), critic, **slow)
        return state, *learning(config)

    return start


def distance(a, b):
    """The largest difference between two trees."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)))


def learned(state):
    """Parameters on the host, which outlive the donation of the state."""
    critic = None if state.critic is None else state.critic.params
    return jax.tree.map(np.array, (state.policy.params, critic))


def values(metrics):
    return {name: float(ratio.value) for name, ratio in metrics.items()}


def test_micro_batches_change_nothing(setting):
    """Ragged rows, one of them empty: 4 parts give the gradient of 1."""
    ends = []
    for k in (1, 4):
        state, seen, update = setting(dataclasses.replace(GRPO, microbatches=k))
        state, metrics = update(state, seen)
        ends.append((learned(state), values(metrics)))
    assert distance(ends[0][0], ends[1][0]) < 1e-6
    assert ends[0][1] == pytest.approx(ends[1][1], abs=1e-5)


MANY_TERMS = dataclasses.replace(GRPO, minibatches=2, dual_clip=3.0, entropy_coef=0.1)


@pytest.mark.parametrize("config", [MANY_TERMS, PRESETS["cispo"]], ids=["many terms", "cispo"])
def test_the_gradient_that_comes_with_the_scores(setting, model, config, monkeypatch):
    """It is that of the loss made of finished log-probabilities; ratios on both sides of their bounds."""
    state, seen, _ = setting(config)
    shift = jnp.asarray(np.random.default_rng(2).normal(size=seen.old_logp.shape), jnp.float32)
    seen = seen.replace(old_logp=seen.old_logp + shift, is_weight=jnp.exp(shift))
    coef = jnp.asarray(0.3) if config.kl_coef else None
    spec = Spec(model, config, temperature=0.9)

    def found():
        value = lambda params, batch: policy_step_loss(params, batch, spec=spec, kl_coef=coef)[0].value
        return jax.jit(jax.value_and_grad(value))(state.policy.params, seen)

    together = found()
    monkeypatch.setattr(AlgorithmConfig, "by_token", False)
    assert distance(together, found()) < 1e-6
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(together[1])) > 1e-2


@pytest.mark.parametrize("name", ["policy", "critic"])
def test_a_shared_prompt_gives_the_gradients_of_separate_rows(setting, model, name):
    """Ragged prompts and groups, an empty row: the losses of GRPO and of PPO's critic agree to 1e-5."""
    config, step_loss = (GRPO, policy_step_loss) if name == "policy" else (PPO, value_step_loss)
    state, seen, _ = setting(config)
    groups = seen.completions.length.shape[1]
    split = lambda x: x.reshape(-1, 1, *x.shape[2:])
    rows = jax.tree.map(split, seen.replace(prompts=None))
    repeat = lambda x: jnp.repeat(x, groups, axis=0)
    rows = rows.replace(prompts=jax.tree.map(repeat, seen.prompts))
    loss = functools.partial(step_loss, spec=Spec(model, config, temperature=0.9))
    gradient = jax.jit(jax.value_and_grad(lambda params, batch: loss(params, batch)[0].value))
    params = getattr(state, name).params
    together, apart = gradient(params, seen), gradient(params, rows)
    assert distance(together, apart) < 1e-5
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(together[1])) > 1e-2


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_accumulated_gradients_are_those_of_the_whole(how):
    """Every aggregation, on rows of 0 to 5 tokens: sums are divided once, after the last part."""
    rng = np.random.default_rng(0)
    batch = (jnp.asarray(rng.normal(size=(6, 5))), jnp.arange(5) < jnp.array([[0], [1], [5], [2], [3], [5]]))

    def loss(w, part):
        total = aggregate(jnp.tanh(w * part[0]), part[1], how, 7)
        return total, {"loss": total}

    whole, parts = (gradients.accumulate(loss, jnp.ones(5), batch, k) for k in (1, 3))
    np.testing.assert_allclose(gradients.mean_gradient(parts), gradients.mean_gradient(whole), atol=1e-7)
    np.testing.assert_allclose(parts.metrics["loss"].value, whole.metrics["loss"].value, rtol=1e-6)


def two_steps(state, seen, update):
    """(parameters after each of two updates, metrics of the second)."""
    state, _ = update(state, seen)
    first = learned(state)
    state, metrics = update(state, seen)
    return first, learned(state), metrics


@pytest.mark.parametrize("config", [GRPO, PPO], ids=["grpo", "ppo"])
def test_eight_devices_are_one(setting, config):
    """Prompts split over a data axis of eight: policy and critic agree to 1e-5 after two updates."""
    state, seen, update = setting(config)
    start = learned(state)
    first, second, metrics = two_steps(state, seen, update)
    mesh = make_mesh(MeshConfig(data=8))
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        placed = jax.device_put(setting(config)[0], whole), jax.device_put(seen, split)
        many_first, many_second, many_metrics = two_steps(*placed, update)
    assert len(many_metrics["loss/policy"].total.sharding.device_set) == 8
    assert distance(first, many_first) < 1e-5 and distance(second, many_second) < 1e-5
    assert values(many_metrics) == pytest.approx(values(metrics), abs=1e-5)
    moved = [distance(a, b) for a, b in zip(start, first, strict=True) if a is not None]
    assert distance(second[0], first[0]) > 0
    if config is PPO:
        assert moved[0] == 0 and moved[1] > 0, "the critic warms up alone"
        _check_ppo_metrics(metrics, seen)
    else:
        assert moved[0] > 0


def _check_ppo_metrics(metrics, seen):
    assert set(metrics) == set(
        """loss/policy ratio/clipped ratio/clip_low ratio/clip_high ratio/clip_dual ratio/mean kl/old kl/ref
        entropy/mean fluency/mean sampler/gap kl/sampler grad/norm update/skipped loss/value value/error
        value/return value/return_square value/clipped grad/critic_norm update/critic_skipped""".split()
    )
    gap = np.abs(np.asarray(seen.old_logp - seen.completions.logp))[np.asarray(seen.completions.action_mask)]
    np.testing.assert_allclose(metrics["sampler/gap"].value, gap.mean(), rtol=1e-5)
    known = seen.completions.action_mask
    np.testing.assert_allclose(metrics["fluency/mean"].value, seen.ref_logp[known].mean(), rtol=1e-5)
    assert float(metrics["grad/norm"].count) == PPO.minibatches


def test_an_update_raises_what_was_good(setting, model, rollout):
    """After a step, the advantage-weighted sum of log-probabilities is larger."""
    state, seen, update = setting(GRPO)
    args = (rollout.prompts, rollout.completions.tokens, Head(0.9))
    logp = jax.jit(lambda p: token_logprobs(p, model, *args)[0])
    before = logp(state.policy.params)
    after = logp(update(state, seen)[0].policy.params)
    assert float(jnp.where(seen.completions.action_mask, (after - before) * seen.advantage, 0.0).sum()) > 0


def test_a_step_that_is_not_finite_is_skipped_and_counted(setting, reference):
    state, seen, update = setting(SLOW, kl_coef=0.1, reference=reference)
    start = learned(state)
    bad = seen.replace(advantage=seen.advantage.at[0, 0, 0].set(jnp.nan), ref_logp=seen.ref_logp * jnp.nan)
    state, metrics = update(state, bad)
    assert distance(learned(state), start) == 0
    assert float(metrics["update/skipped"].value) == 1 and float(metrics["grad/norm"].count) == 0
    assert float(state.kl_coef) == pytest.approx(0.1)
    state, metrics = update(state, seen)
    assert distance(learned(state), start) > 0 and float(metrics["update/skipped"].value) == 0


def test_kl_controller_and_reference_refresh(setting, reference):
    """16 samples of a horizon of 160 move the coefficient by 2 %; the reference follows every 2 steps.

    A KL limit drops three of four mini-batches: the first is on-policy and always taken.
    """
    state, seen, update = setting(SLOW, kl_coef=0.1, reference=reference)
    state, metrics = update(state, seen)
    assert float(metrics["update/stopped"].value) == 0.75
    assert int(optax.tree.get(state.policy.opt_state, "count")) == 1
    assert float(metrics["kl/coef"].value) == pytest.approx(0.1)
    assert float(state.kl_coef) == pytest.approx(0.102)
    assert distance(state.reference, reference) == 0
    state, _ = update(state, seen)
    assert float(state.kl_coef) == pytest.approx(0.102 * 1.02)
    assert distance(state.reference, state.policy.params) == 0 and distance(state.reference, reference) > 0


def test_mini_batches_cover_every_prompt_once_an_epoch():
    config = AlgorithmConfig(epochs=3, minibatches=4)
    rows = np.asarray(minibatch_rows(jax.random.key(0), 12, config)[1]).reshape(3, 12)
    assert (np.sort(rows, axis=-1) == np.arange(12)).all()
    assert len({tuple(row) for row in rows}) == 3
    assert minibatch_rows(jax.random.key(0), 12, AlgorithmConfig())[1] is None


@pytest.mark.parametrize(("name", "parts"), [("minibatches", 3), ("microbatches", 5)])
def test_parts_that_do_not_divide_are_refused(setting, name, parts):
    state, seen, update = setting(AlgorithmConfig(**{name: parts}))
    with pytest.raises(UserError, match=f"{name}={parts} must divide the 8 prompts"):
        update(state, seen)
