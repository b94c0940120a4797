"""The programs of learning in micro-batches by token count, of the largest shape (`learning.by_tokens`).

How often a step calls them is counted for completions that all fill their budget. What is left out,
advantages and sums of metrics, is small.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Wrapped

from gtalign_jax.learning import by_tokens
from gtalign_jax.learning.gradients import Sums
from gtalign_jax.learning.learner import Learner
from gtalign_jax.learning.scores import needs_scores
from gtalign_jax.mesh.sharding import batch_shards
from gtalign_jax.planning import programs
from gtalign_jax.planning.programs import Program
from gtalign_jax.run.settings import Settings
from gtalign_jax.types import ModelState, PyTree, TrainState


class Largest(NamedTuple):
    """The micro-batch of the largest shape: (rows, start) abstract, its token slots, calls of an epoch."""

    shape: tuple[int, int]
    rows: tuple[PyTree, PyTree]
    tokens: int
    calls: int


class Trained(NamedTuple):
    """One model that learns: its state, its sums of a micro-batch with their further arguments, and its step
    with the arguments after the sums. waiting: what else is on the devices meanwhile."""

    name: str
    state: ModelState
    sums: Callable[..., Sums]
    given: tuple[PyTree, ...]
    step: Wrapped
    flags: tuple[PyTree, ...]
    waiting: PyTree


def microbatch_programs(settings: Settings, learner: Learner, mesh: Mesh) -> list[Program]:
    """What the models say of a micro-batch, then its gradient and the step of every model that learns."""
    algorithm, align = settings.algorithm, settings.align
    slots, group = settings.buckets.prompt[-1], settings.align.group_size
    whole = (align.prompts, slots, group, settings.max_new_tokens)
    sizes = by_tokens.schedule_sizes(algorithm, whole, batch_shards(mesh))
    shape, count = list(sizes.counts.items())[-1]
    rows = jax.ShapeDtypeStruct((count,), jnp.int32), jax.ShapeDtypeStruct((count, group), jnp.int32)
    largest = Largest(
        shape,
        programs.replicated(rows, mesh),
        count * (slots + math.prod(shape)),
        algorithm.minibatches * math.ceil(align.prompts / algorithm.minibatches / count),
    )
    state = programs.planned_state(settings, learner, mesh)
    experience = programs.experience_call(settings, learner, mesh, state, ())
    seen = programs.by_prompt_where_possible(experience.traced.out_info, mesh)
    found = score_programs(settings, learner, mesh, state, largest)
    for model in trained_models(settings, learner, mesh, state):
        found += learning_programs(learner, mesh, model, seen, largest)
    return found


def score_programs(
    settings: Settings, learner: Learner, mesh: Mesh, state: TrainState, largest: Largest
) -> list[Program]:
    """The forward passes before the update; none where nothing reads them."""
    models = programs.abstract_models(settings, learner.spec.model, mesh, state)
    if not needs_scores(learner.spec, models):
        return []
    rollout = programs.by_prompt(programs.abstract_rollout(settings), mesh)
    made = by_tokens.score_programs(learner.spec, rollout.completions.tokens.sharding)
    scores = programs.by_prompt(jax.eval_shape(made.start, rollout, models), mesh)
    args = (largest.shape, scores, rollout, *largest.rows, models)
    moments = (state.policy.opt_state, None if state.critic is None else state.critic.opt_state)
    name, calls = "experience part", largest.calls
    return [Program(name, mesh, made.add, args, {}, moments, largest.tokens, calls=calls)]


def trained_models(settings: Settings, learner: Learner, mesh: Mesh, state: TrainState) -> list[Trained]:
    """The policy, and the critic when there is one."""
    model = learner.spec.model
    base, reference = (
        programs.abstract_base(settings, model, mesh),
        programs.reference_params(settings, model, mesh),
    )
    step_policy, step_critic = by_tokens.jitted_steps(settings.algorithm, learner.optimizers)
    flags = tuple(programs.replicated(jax.ShapeDtypeStruct((), kind), mesh) for kind in (jnp.int32, bool))
    sums, given = by_tokens.policy_sums, (base, state.kl_coef)
    policy = Trained(
        "policy", state.policy, sums, given, step_policy, flags, (reference, state.reference, state.critic)
    )
    if state.critic is None:
        return [policy]
    waiting = (reference, state.reference, state.policy)
    return [policy, Trained("critic", state.critic, by_tokens.value_sums, (base,), step_critic, (), waiting)]


def learning_programs(
    learner: Learner, mesh: Mesh, model: Trained, seen: PyTree, largest: Largest
) -> list[Program]:
    """A micro-batch's gradient added to its sums, and the step that follows from them."""
    config, params = learner.spec.algorithm, model.state.params
    made = by_tokens.sum_programs(learner.spec, model.sums, params)
    sums = laid_out(jax.eval_shape(made.start, seen, params, *model.given), params, mesh)
    args = (largest.shape, sums, seen, *largest.rows, params, *model.given)
    beside, calls = (model.state.opt_state, model.waiting), config.epochs * largest.calls
    add = Program(f"{model.name} part", mesh, made.add, args, {}, beside, largest.tokens, calls=calls)
    args, calls = (model.state, sums, *model.flags), config.epochs * config.minibatches
    return [add, Program(f"{model.name} step", mesh, model.step, args, {}, model.waiting, 0, calls=calls)]


def laid_out(sums: Sums, params: PyTree, mesh: Mesh) -> Sums:
    """Abstract sums with the gradient split as the parameters."""
    grads = programs.placed(sums.grads, jax.tree.map(lambda x: x.sharding, params))
    return Sums(grads, *programs.replicated((sums.count, sums.metrics), mesh))
