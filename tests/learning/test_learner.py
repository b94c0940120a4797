"""One value learns: equal ones share their programs, all of which can be made ahead."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gtalign_jax.errors import UserError
from gtalign_jax.learning import microbatches
from gtalign_jax.learning.algorithm import PRESETS, AlgorithmConfig
from gtalign_jax.learning.learner import Learner
from gtalign_jax.learning.spec import Spec
from gtalign_jax.learning.state import OptimizerConfig, init_model, init_state, make_optimizer
from gtalign_jax.learning.update import Optimizers
from gtalign_jax.mesh import memory
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, place_batch, shard_tree, spread
from gtalign_jax.models.heads import init_value_model
from gtalign_jax.models.transformer import logical_axes
from gtalign_jax.run.compiles import counting_compiles
from gtalign_jax.types import Batch, Models

SGD = optax.sgd(0.1)
# A critic, several mini-batches, a coefficient that moves and a reference that follows.
PPO = dataclasses.replace(
    PRESETS["ppo"], minibatches=2, kl_coef=0.1, kl_target=1e-6, kl_horizon=160, reference_every=2
)
WHOLE, BY_TOKENS = 0, 24  # token slots of a micro-batch; a prompt takes 3 + 2 * 4 of them at most
BUDGETS = pytest.mark.parametrize("budget", [WHOLE, BY_TOKENS], ids=["whole", "by tokens"])


def make(model, config, budget, temperature):
    """A learner made anew; no other test has one of this temperature."""
    config = dataclasses.replace(config, microbatch_tokens=budget)
    return Learner(Spec(model, config, temperature), Optimizers(SGD, SGD if config.needs_critic else None))


@pytest.fixture
def batch(rollout, reward, valid, monkeypatch):
    """Laid out as in training; rows of two shapes."""
    monkeypatch.setattr(microbatches, "STEPS", (1.0, 0.5))
    return place_batch(Batch(rollout, reward, valid), make_mesh(MeshConfig()))


@pytest.fixture
def both(model, params, reference):
    """The parameters to start from and the reference's, split by the table as in training."""
    split = shard_tree(logical_axes(model), make_mesh(MeshConfig()), params)
    return jax.device_put(params, split), jax.device_put(reference, split)


def begin(learner, both):
    """The state at step 0."""
    (params, reference), model = both, learner.spec.model
    copy = lambda: jax.tree.map(jnp.copy, params)
    config, critic, slow = learner.spec.algorithm, None, {}
    if config.needs_critic:
        critic = init_model(init_value_model(copy(), model), SGD)
    if config.kl_target:
        slow = {"kl_coef": config.kl_coef, "reference": reference}
    state = init_state(jax.random.key(7), init_model(copy(), SGD), critic, **slow)
    return spread(state, make_mesh(MeshConfig()))


def asked(state, reference):
    """What says something of a batch before the update."""
    critic = None if state.critic is None else state.critic.params
    return Models(state.policy.params, reference if state.reference is None else state.reference, critic)


def step(learner, state, reference, batch):
    """(state, metrics) after one rollout, and how many programs were compiled for it."""
    schedule = learner.schedule(state.rng, jax.device_get(batch.rollout))
    with counting_compiles() as compiled:
        experience = learner.experience(asked(state, reference), batch, state.kl_coef, schedule)
        state, metrics = learner.update(state, experience, schedule=schedule)
        jax.block_until_ready(state)
    return state, metrics, compiled.take()


@BUDGETS
def test_equal_learners_share_their_programs(model, both, batch, budget):
    counts, ends = [], []
    for _ in range(2):
        learner = make(model, PRESETS["grpo"], budget, 0.81)
        state, _, compiled = step(learner, begin(learner, both), both[1], batch)
        counts.append(compiled)
        ends.append(state.policy.params)
    assert counts[0] > 0 == counts[1]
    jax.tree.map(np.testing.assert_array_equal, *ends)


@BUDGETS
def test_what_is_compiled_ahead_is_all_that_runs(model, both, batch, budget):
    """Nothing is compiled in the first step nor in the second, and the state is none the worse."""
    learner, (params, reference) = make(model, PPO, budget, 0.82), both
    state = begin(learner, both)
    schedule = learner.schedule(state.rng, jax.device_get(batch.rollout))
    with counting_compiles() as ahead:
        learner.compile(state, asked(state, reference), batch, schedule)
    assert ahead.take() > 0
    jax.tree.map(np.testing.assert_array_equal, state.policy.params, params)
    for _ in range(2):
        state, metrics, compiled = step(learner, state, reference, batch)
        assert compiled == 0
        assert float(metrics["update/skipped"].value) == 0.0
    assert int(state.step) == 2


@pytest.mark.parametrize(
    ("budget", "field"),
    [(WHOLE, "raise config.algorithm.microbatches"), (BY_TOKENS, "lower config.algorithm")],
)
def test_an_update_that_does_not_fit_is_refused_before_it_runs(
    model, both, batch, budget, field, monkeypatch
):
    learner = make(model, PRESETS["grpo"], budget, 0.83)
    state = begin(learner, both)
    schedule = learner.schedule(state.rng, jax.device_get(batch.rollout))
    monkeypatch.setattr(memory, "free_bytes", lambda: 100)
    with pytest.raises(UserError, match=f"^out of memory: .* needs .* GiB free; {field}"):
        learner.compile(state, asked(state, both[1]), batch, schedule)


@pytest.mark.parametrize("critic", [False, True], ids=["policy", "critic"])
def test_moments_in_the_hosts_memory_need_one_update_a_program(model, critic):
    here, away = (make_optimizer(OptimizerConfig(offload=away), 8) for away in (False, True))
    both = Optimizers(here, away) if critic else Optimizers(away)
    for fields in ({"minibatches": 2}, {"epochs": 2}):
        with pytest.raises(UserError, match="offload: .* need algorithm.microbatch_tokens; set it") as caught:
            Learner(Spec(model, AlgorithmConfig(**fields)), both)
        assert "\n" not in str(caught.value)
        assert Learner(Spec(model, AlgorithmConfig(**fields, microbatch_tokens=64)), both)
    assert Learner(Spec(model, AlgorithmConfig()), both)
    assert Learner(Spec(model, AlgorithmConfig(minibatches=2)), Optimizers(here, here))
