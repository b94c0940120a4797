"""Updates in micro-batches by token count: the schedule, and that nothing but the padding is left out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.sharding import NamedSharding

from gtalign_jax.errors import UserError
from gtalign_jax.learning import microbatches
from gtalign_jax.learning.algorithm import PRESETS, AlgorithmConfig
from gtalign_jax.learning.learner import Learner
from gtalign_jax.learning.microbatches import Sizes, first_fit, plan_schedule, row_shapes
from gtalign_jax.learning.spec import Spec
from gtalign_jax.learning.state import OptimizerConfig, init_model, init_state, make_optimizer
from gtalign_jax.learning.update import Optimizers
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, partition_spec, place_batch, spread
from gtalign_jax.models import lora
from gtalign_jax.models.heads import init_value_model
from gtalign_jax.models.lora import LoraConfig
from gtalign_jax.models.transformer import logical_axes
from gtalign_jax.run.compiles import counting_compiles
from gtalign_jax.types import Batch, Limit, Models

SGD = optax.sgd(optax.constant_schedule(0.1))
# Between them what an update may do: KL in the loss and the reward, ratios per token and sequence, all
# aggregations, a critic, mini-batches, epochs, brakes and slow parts.
GRPO = PRESETS["grpo"]
PPO = dataclasses.replace(
    PRESETS["ppo"], minibatches=2, kl_coef=0.1, bootstrap_truncated=True, critic_warmup=1
)
BRAKES = AlgorithmConfig(
    kl_coef=0.1,
    kl_target=1e-6,
    kl_horizon=160,
    reference_every=2,
    epochs=2,
    minibatches=2,
    kl_stop=1e-3,
    ratio="sequence",
    aggregation="constant",
    is_cap=2.0,
    drop_truncated=True,
    entropy_coef=0.01,
)
BUDGET = 24  # a prompt takes 3 + 2 * 4 slots at most, so a micro-batch holds at least two of eight


# --- the schedule --------------------------------------------------------------------------------

LENGTHS = arrays.arrays(
    np.int64, st.tuples(st.integers(1, 9), st.integers(1, 8)), elements=st.integers(0, 13)
)


@given(LENGTHS, st.integers(1, 3), st.integers(0, 500), st.randoms(use_true_random=False))
def test_every_prompt_is_in_one_micro_batch_that_keeps_the_budget(length, shards, more, random):
    """And no completion crosses a row's end or another completion."""
    prompts, group = length.shape
    order = list(range(prompts))
    random.shuffle(order)
    budget = shards * (5 + 13 * group) + more
    sizes = Sizes(budget, prompts, slots=5, group=group, width=13, shards=shards)
    schedule = plan_schedule(length, np.array(order)[None], sizes)
    (chosen,) = schedule.updates
    held = np.concatenate([part.rows for part in chosen])
    assert sorted(held[held < prompts]) == list(range(prompts))
    for part in (*chosen, *schedule.empty):
        rows, width = part.shape
        assert len(part.rows) * (5 + rows * width) <= budget and len(part.rows) % shards == 0
        assert (part.shape, len(part.rows)) in sizes.counts.items()
        for p, start in zip(part.rows, part.start, strict=True):
            used = np.zeros(rows * width, int)
            for g in range(group) if p < prompts else ():
                own = slice(start[g], start[g] + length[p, g])
                used[own] += 1
                assert length[p, g] == 0 or start[g] // width == (own.stop - 1) // width
            assert used.max() <= 1 and (p >= prompts or used.sum() == length[p].sum())
    assert [part.shape for part in schedule.empty] == list(row_shapes(group, 13))
    assert all((part.rows == prompts).all() for part in schedule.empty)


def test_only_the_last_micro_batch_has_empty_places_and_short_groups_take_few_rows():
    length = np.array([[8, 1, 1, 1]] * 5 + [[8, 8, 8, 8]] + [[1, 2, 1, 1]] * 5)
    (chosen,) = plan_schedule(length, np.arange(11)[None], Sizes(80, 11, slots=4, group=4, width=8)).updates
    assert [part.shape for part in chosen] == [(4, 8), (2, 8), (1, 8)]
    assert [(part.rows < 11).sum() for part in chosen] == [2, 4, 5]
    assert [len(part.rows) for part in chosen] == [2, 4, 6]


def test_shapes_are_few_and_the_largest_holds_everything():
    assert row_shapes(8, 512) == ((1, 512), (2, 512), (3, 512), (4, 512), (6, 512), (8, 512))
    assert row_shapes(1, 512) == ((1, 64), (1, 128), (1, 192), (1, 256), (1, 384), (1, 512))
    assert max(first_fit([512] * 8, 512)[:, 0]) == 7


def test_a_budget_that_is_too_small_is_refused():
    with pytest.raises(UserError, match="microbatch_tokens=100: 2 devices.* take 208; raise it"):
        _ = Sizes(100, 8, slots=8, group=3, width=32, shards=2).counts
    with pytest.raises(ValueError, match="^microbatch_tokens=8.*microbatches=1"):
        AlgorithmConfig(microbatch_tokens=8, microbatches=2)


# --- the update ----------------------------------------------------------------------------------


def largest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)))


def values(metrics):
    return {name: float(ratio.value) for name, ratio in metrics.items()}


def learner_of(config, model, budget=0, *, optimizer=SGD, limit=None):
    """budget: token slots of a micro-batch; 0: the update of all at once."""
    config = dataclasses.replace(config, microbatch_tokens=budget)
    return Learner(Spec(model, config, 0.9, limit), Optimizers(optimizer, SGD))


def two_steps(learner, start, batch, *, base=None, shards=1):
    """(state, metrics of each, programs compiled by the second) after the updates of two rollouts.

    start: (state, reference).
    """
    (state, reference), found = start, []
    for _ in range(2):
        schedule = learner.schedule(state.rng, jax.device_get(batch.rollout), shards)
        assert (schedule is None) == (learner.spec.algorithm.microbatch_tokens == 0)
        critic = None if state.critic is None else state.critic.params
        compared = reference if state.reference is None else state.reference
        models = Models(state.policy.params, compared, critic, base)
        with counting_compiles() as compiled:
            experience = learner.experience(models, batch, state.kl_coef, schedule)
            state, metrics = learner.update(state, experience, base, schedule)
            jax.block_until_ready(state)
        found.append(metrics)
    return state, found, compiled.take()


def begin(config, model, params, reference, optimizer=SGD):
    """(a fresh state, the reference)."""
    copy = lambda: jax.tree.map(jnp.copy, params)
    critic = None
    if config.needs_critic:
        value_model = init_value_model(copy(), model) | {"head": jnp.linspace(-1.0, 1.0, 16)}
        critic = init_model(value_model, SGD)
    slow = {"kl_coef": 0.1, "reference": reference} if config.kl_target else {}
    return init_state(jax.random.key(7), init_model(copy(), optimizer), critic, **slow), reference


def same(one, other, found, others):
    assert largest(one.policy.params, other.policy.params) < 1e-5
    if one.critic is not None:
        assert largest(one.critic.params, other.critic.params) < 1e-5
    for metrics, more in zip(found, others, strict=True):
        assert values(metrics) == pytest.approx(values(more), abs=1e-5)


@pytest.fixture
def batch(rollout, reward, valid, monkeypatch):
    """Ragged rows, one without a verdict; rows of one shape, as each is some more programs to compile."""
    monkeypatch.setattr(microbatches, "STEPS", (1.0,))
    return Batch(rollout, reward, valid)


def test_adapters_held_to_a_grammar(model, params, batch, monkeypatch):
    """Policy and reference are adapters on one base; half of the vocabulary is open, by the place.

    Rows of two shapes: groups that are packed into one row, and others.
    """
    monkeypatch.setattr(microbatches, "STEPS", (1.0, 0.5))
    layers = lora.init_adapters(jax.random.key(5), model, LoraConfig(rank=2, alpha=4.0))["layers"]
    for number, part in enumerate(layers.values()):
        part["lora_b"] = 0.3 * jax.random.normal(jax.random.key(number), part["lora_b"].shape)
    trained, base = lora.split(lora.join(params, {"layers": layers}))
    parity = lambda at, logits: (jnp.arange(logits.shape[-1]) - at[..., None]) % 2 == 0
    close = lambda at, logits: jnp.where(parity(at, logits), logits, logits - 40.0)
    limit = Limit(lambda completions: (completions.tokens + jnp.arange(4)) % 2, close)
    mesh = make_mesh(MeshConfig())
    start = lambda: begin(GRPO, model, trained, jax.tree.map(lambda x: 0.5 * x, trained))
    run = lambda budget: two_steps(
        learner_of(GRPO, model, budget, limit=limit),
        *spread((start(), batch), mesh),
        base=spread(base, mesh),
    )
    whole, metrics, _ = run(0)
    state, found, compiled = run(BUDGET)
    same(state, whole, found, metrics)
    assert compiled == 0
    assert largest(state.policy.params, trained) > 1e-4
    clock = lambda state: (int(state.step), jax.random.key_data(state.rng).tolist())
    assert clock(state) == clock(whole)


def test_brakes_slow_parts_and_moments_in_the_hosts_memory(model, params, reference, batch):
    """Epochs and mini-batches until the KL limit; the optimizer of the whole update keeps its moments."""
    here, away = (make_optimizer(OptimizerConfig(lr=0.01, offload=away), 8) for away in (False, True))
    start = lambda optimizer: begin(BRAKES, model, params, reference, optimizer)
    learner = functools.partial(learner_of, BRAKES, model)
    whole, metrics, _ = two_steps(learner(optimizer=here), start(here), batch)
    state, found, _ = two_steps(learner(BUDGET, optimizer=away), start(away), batch)
    same(state, whole, found, metrics)
    assert 0 < float(found[0]["update/stopped"].value) < 1
    assert float(state.kl_coef) == pytest.approx(float(whole.kl_coef))
    assert largest(state.reference, whole.reference) < 1e-5
    assert optax.tree.get(state.policy.opt_state, "mu")["embedding"].sharding.memory_kind == "pinned_host"


def test_ppo_on_eight_devices_is_ppo_on_one(model, params, reference, batch):
    """Parameters split over fsdp and tensor, sequences over context; the second step compiles nothing."""
    one, metrics, _ = two_steps(learner_of(PPO, model), begin(PPO, model, params, reference), batch)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))
    lay = lambda names, x: jax.device_put(x, NamedSharding(mesh, partition_spec(names, x.shape, mesh)))
    axes, is_names = logical_axes(model), lambda x: isinstance(x, tuple)
    with jax.set_mesh(mesh):
        split = [jax.tree.map(lay, axes, tree, is_leaf=is_names) for tree in (params, reference)]
        start = spread(begin(PPO, model, *split), mesh)
        learner = learner_of(PPO, model, 2 * (3 + 2 * 5))
        many, found, compiled = two_steps(learner, start, place_batch(batch, mesh), shards=2)
    same(many, one, found, metrics)
    assert compiled == 0
