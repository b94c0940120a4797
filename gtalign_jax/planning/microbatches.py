"""The programs of learning in micro-batches by token count, of the largest shape (`learning.parted`).

How often a step calls them is counted for completions that all fill their budget. What is left out,
advantages and sums of metrics, is small.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gtalign_jax.align import optimizers
from gtalign_jax.learning import gradients
from gtalign_jax.learning.experience import needs_scores
from gtalign_jax.learning.part_scores import PartScores
from gtalign_jax.learning.parted import PartSum, learner_steps, update_sizes
from gtalign_jax.learning.update import step_losses
from gtalign_jax.mesh.sharding import batch_shards
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.planning import programs
from gtalign_jax.planning.programs import Program
from gtalign_jax.run.settings import Settings
from gtalign_jax.types import PyTree, TrainState


def part_programs(settings: Settings, model: ModelConfig, mesh: Mesh) -> list[Program]:
    """What the models say of a micro-batch, then its gradient and the step of every learner."""
    algorithm, align = settings.algorithm, settings.align
    slots = settings.buckets.prompt[-1]
    sizes = (align.prompts, slots, align.group_size, settings.max_new_tokens, batch_shards(mesh))
    shape, count = list(update_sizes(algorithm, *sizes).counts.items())[-1]
    rows = jax.ShapeDtypeStruct((count,), jnp.int32), jax.ShapeDtypeStruct((count, sizes[2]), jnp.int32)
    part = Largest(
        shape,
        programs.replicated(rows, mesh),
        count * (slots + math.prod(shape)),
        algorithm.minibatches * math.ceil(align.prompts / algorithm.minibatches / count),
    )
    state = programs.align_state(settings, model, mesh)
    found = score_programs(settings, model, mesh, state, part)
    return found + gradient_programs(settings, model, mesh, state, part)


class Largest(NamedTuple):
    """The micro-batch of the largest shape: (rows, start) abstract, its token slots, calls of an epoch."""

    shape: tuple[int, int]
    rows: tuple[PyTree, PyTree]
    tokens: int
    calls: int


def score_programs(
    settings: Settings, model: ModelConfig, mesh: Mesh, state: TrainState, part: Largest
) -> list[Program]:
    """The forward passes before the update; none where nothing reads them."""
    algorithm, reference = settings.algorithm, programs.reference_params(settings, model, mesh)
    critic = None if state.critic is None else state.critic.params
    models = (state.policy.params, reference, critic)
    if not needs_scores(algorithm, False, *models):
        return []
    fixed = {"model": model, "config": algorithm, "temperature": settings.sampling.temperature}
    rollout = programs.by_prompt(programs.abstract_rollout(settings), mesh)
    zeros, put = PartScores(fixed).programs(rollout.completion.sharding)
    base = programs.abstract_base(settings, model, mesh)
    scores = programs.by_prompt(jax.eval_shape(zeros, rollout, *models, base), mesh)
    args = (part.shape, scores, rollout, *part.rows, *models, base)
    moments = (state.policy.opt_state, None if critic is None else state.critic.opt_state)
    return [Program("experience part", mesh, put, args, {}, moments, part.tokens, calls=part.calls)]


def gradient_programs(
    settings: Settings, model: ModelConfig, mesh: Mesh, state: TrainState, part: Largest
) -> list[Program]:
    """A micro-batch's gradient and the step, of the policy and of the critic when there is one."""
    algorithm = settings.algorithm
    whole = programs.experience_program(settings, model, mesh, state, ())
    seen = programs.by_prompt_where_possible(whole.traced.out_info, mesh)
    base = programs.abstract_base(settings, model, mesh)
    policy_loss, value_loss = step_losses(model, algorithm, settings.sampling.temperature, None, False)
    losses = {"policy": policy_loss, "critic": lambda base, _: value_loss(base)}
    steps = learner_steps(algorithm, *optimizers(settings))
    found = []
    for (name, loss), step in zip(losses.items(), steps, strict=True):
        learner = getattr(state, name)
        if learner is None:
            continue
        coef = state.kl_coef if algorithm.kl_target > 0 and name == "policy" else None
        zeros, add = PartSum(loss).programs(learner.params)
        sums = laid_out(jax.eval_shape(zeros, learner.params, seen, base, coef), learner.params, mesh)
        resident = waiting(settings, model, mesh, state, name)
        args = (part.shape, sums, learner.params, seen, *part.rows, base, coef)
        beside, calls = (learner.opt_state, resident), algorithm.epochs * part.calls
        found.append(Program(f"{name} part", mesh, add, args, {}, beside, part.tokens, calls=calls))
        flags = [programs.replicated(jax.ShapeDtypeStruct((), kind), mesh) for kind in (jnp.int32, bool)]
        args, calls = (learner, sums, *(flags if name == "policy" else ())), algorithm.epochs
        calls *= algorithm.minibatches
        found.append(Program(f"{name} step", mesh, step, args, {}, resident, 0, calls=calls))
    return found


def waiting(settings: Settings, model: ModelConfig, mesh: Mesh, state: TrainState, name: str) -> PyTree:
    """What else is on the devices while a learner is trained: the reference and the other learner."""
    other = state.critic if name == "policy" else state.policy
    return programs.reference_params(settings, model, mesh), other


def laid_out(sums: gradients.Sums, params: PyTree, mesh: Mesh) -> gradients.Sums:
    """Abstract sums with the gradient split as the parameters."""
    grads = programs.placed(sums.grads, jax.tree.map(lambda x: x.sharding, params))
    return gradients.Sums(grads, *programs.replicated((sums.count, sums.metrics), mesh))
