"""The alignment phase. One step reads top to bottom in `align_step`:

sampled    = groups of completions for the prompts of step k     a function of (seed, k)
reward     = their welfare, normalised per task if configured
experience = advantages, old and reference logprobs
state      = the update they lead to                             donated
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gtalign_jax.learning.experience import make_experience, reward_components
from gtalign_jax.learning.microbatches import Plan
from gtalign_jax.learning.part_scores import make_parted_experience
from gtalign_jax.learning.parted import make_parted_update, plan_update
from gtalign_jax.learning.state import Optimizer, init_state, make_optimizer
from gtalign_jax.learning.update import make_update
from gtalign_jax.mesh import processes
from gtalign_jax.mesh.sharding import batch_shards, place_batch, spread
from gtalign_jax.models import lora
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.heads import init_value_model
from gtalign_jax.rewards.normalize import normalize_scores
from gtalign_jax.rewards.tasks import TASKS
from gtalign_jax.rollout import generator
from gtalign_jax.rollout.generator import hand_over, trainer_limit
from gtalign_jax.run.groups import (
    Sampled,
    no_completions,
    sample_ahead,
    sample_groups,
    step_prompts,
    steps_by_width,
)
from gtalign_jax.run.job import Job
from gtalign_jax.run.phase import Metrics, Session, run_phase
from gtalign_jax.run.rollouts import write_rollouts
from gtalign_jax.run.score import Scored, rollout_lines
from gtalign_jax.run.settings import Settings
from gtalign_jax.run.step_metrics import counted, counters, rollout_metrics
from gtalign_jax.types import Experience, PyTree, Rollout, TrainState


def run_align(job: Job, reference: PyTree, session: Session) -> PyTree:
    """The parameters after alignment; the reference is the policy it starts from, never changed.

    With adapters in it (`models.lora`), the adapters alone are trained: the policy's go on from the
    reference's, and both stand on the same base.
    """
    settings = job.settings
    if not settings.align.steps:
        return reference
    both = optimizers(settings)
    temperature = settings.sampling.temperature
    limit = trainer_limit(job.generator, settings.max_new_tokens)
    # A rollout from before the last update has its sampler's logprobs for old ones, or weights instead.
    stale = {"old_from_sampler": settings.align.overlap and not settings.algorithm.is_cap}
    fixed = {"model": job.model, "config": settings.algorithm, "temperature": temperature, **stale}
    learn = {"optimizer": both[0], "critic_optimizer": both[1], "limit": limit and limit.logits}
    if settings.algorithm.microbatch_tokens:
        experience = make_parted_experience(limit=limit, **fixed)
        update = make_parted_update(**learn, **fixed)
    else:
        experience = jax.jit(functools.partial(make_experience, limit=limit, **fixed))
        update = make_update(**learn, **fixed)
    step, before = (functools.partial(f, job, reference, experience, update) for f in (align_step, warm_up))
    trained, base = lora.split(reference)
    state = start_state(settings, job.model, both, trained)
    phase = (session, "align", state, settings.align.steps, step, before if settings.start.warm_up else None)
    return lora.join(base, run_phase(*phase).policy.params)


def optimizers(settings: Settings) -> tuple[Optimizer, Optimizer | None]:
    """The policy's and the critic's optimizer (None without a critic) over all updates of the phase."""
    algorithm = settings.algorithm
    updates = settings.align.steps * algorithm.epochs * algorithm.minibatches
    critic = make_optimizer(settings.critic_optimizer, updates) if algorithm.needs_critic else None
    return make_optimizer(settings.policy_optimizer, updates), critic


def start_state(
    settings: Settings,
    model: ModelConfig,
    both: tuple[Optimizer, Optimizer | None],
    reference: PyTree,
) -> TrainState:
    """The state at step 0: the policy is a copy of the reference, and the critic starts from its trunk.

    both: from `optimizers`. reference: what is trained of it (`lora.split`); with adapters, policy and
    critic are adapters only.
    """
    algorithm, (optimizer, critic_optimizer) = settings.algorithm, both
    copy = lambda: jax.tree.map(jnp.copy, reference)  # the state is donated, the reference must live on
    critic = (init_value_model(copy(), model), critic_optimizer) if algorithm.needs_critic else None
    return init_state(
        jax.random.key(settings.seed + 1),
        copy(),
        optimizer,
        critic,
        kl_coef=algorithm.kl_coef if algorithm.kl_target > 0 else None,
        reference=reference if algorithm.reference_every > 0 else None,
        waiting=no_completions(settings) if settings.align.overlap else None,
    )


def align_step(
    job: Job,
    reference: PyTree,
    experience: Callable[..., Experience],
    update: Callable,
    state: TrainState,
    k: int,
) -> tuple[TrainState, Metrics]:
    """One rollout and the update it leads to."""
    settings, (_, base) = job.settings, lora.split(reference)
    before, last = counters(job), k + 1 == settings.align.steps
    params, waiting = lora.join(base, state.policy.params), None
    hand_over(job.generator, job.engine, params, due=k % settings.engine.push_every == 0)
    if settings.align.overlap:
        sampled, drawn, waiting = sample_ahead(job, params, k, state.waiting, last)
        state = state.replace(waiting=None)
    else:
        sampled, drawn = sample_groups(job, params, k)
    rollout, scored = sampled.rollout, sampled.scored
    arrays, extra = training_arrays(job, sampled)
    parts = parts_of(job, state, rollout)
    seen = experience_of(job, reference, experience, state, arrays, extra | parts)
    state, metrics = update(state, seen, base, **parts)
    if waiting is not None:
        state = state.replace(waiting=spread(waiting, job.mesh))
    if (last or k % settings.align.dump_every == 0) and processes.is_main():
        write_rollouts(job.workdir, "train", k, rollout_lines(job, rollout, scored, k))
    return state, metrics | counted(before, counters(job)) | drawn | rollout_metrics(sampled)


def experience_of(
    job: Job,
    reference: PyTree,
    experience: Callable[..., Experience],
    state: TrainState,
    arrays: tuple[Rollout, np.ndarray, np.ndarray],
    extra: dict[str, Any],
) -> Experience:
    """`make_experience` of host arrays (`training_arrays`) under the models of a state."""
    start, base = lora.split(reference)
    critic = None if state.critic is None else state.critic.params
    moving = getattr(state, "reference", None)
    models = (state.policy.params, start if moving is None else moving, critic)
    options: dict[str, Any] = dict(extra)
    if "untrained" in extra:
        options["untrained"] = place_batch(extra["untrained"], job.mesh)
    if job.settings.algorithm.kl_target > 0:
        options["kl_coef"] = state.kl_coef
    return experience(*place_batch(arrays, job.mesh), *models, base=base, **options)


def parts_of(job: Job, state: TrainState, rollout: Rollout) -> dict[str, Plan]:
    """{"plan": the micro-batches of a rollout's updates}, host arrays; {} unless they go by token count."""
    if not job.settings.algorithm.microbatch_tokens:
        return {}
    return {"plan": plan_update(job.settings.algorithm, state.rng, rollout, batch_shards(job.mesh))}


def training_arrays(
    job: Job, sampled: Sampled
) -> tuple[tuple[Rollout, np.ndarray, np.ndarray], dict[str, np.ndarray]]:
    """((rollout, reward, valid), what else `make_experience` needs under these settings), host arrays."""
    shape, extra = sampled.rollout.length.shape, {}
    if job.untrained:
        extra["untrained"] = sampled.untrained
    if job.settings.algorithm.needs_components:
        parts = reward_components(sampled.scored.reward, job.settings.algorithm.components)
        extra["components"] = np.asarray(parts).reshape(-1, *shape)
    return (sampled.rollout, *training_reward(job, sampled.scored, shape)), extra


def blank_arrays(job: Job, k: int) -> tuple[tuple[Rollout, np.ndarray, np.ndarray], dict[str, np.ndarray]]:
    """What `training_arrays` gives for step k, in shapes and types, with nothing written yet."""
    prompts, _ = step_prompts(job, k)
    rollout = Rollout(prompts.tokens, prompts.length, **no_completions(job.settings))
    shape, extra = rollout.length.shape, {}
    if job.untrained:
        extra["untrained"] = np.zeros(rollout.completion.shape, bool)
    if job.settings.algorithm.needs_components:
        extra["components"] = np.zeros((len(job.settings.algorithm.components), *shape), np.float32)
    return (rollout, np.zeros(shape, np.float32), np.zeros(shape, bool)), extra


def warm_up(
    job: Job,
    reference: PyTree,
    experience: Callable[..., Experience],
    update: Callable,
    state: TrainState,
    first: int,
) -> None:
    """Compile what the steps from `first` on will run, in every bucket of prompts that they meet.

    Generation and experience run once on nothing; the update, which would consume the state, does not run.
    """
    settings, (_, base) = job.settings, lora.split(reference)
    align, buckets = settings.align, steps_by_width(job, first)
    if align.overlap:
        state = state.replace(waiting=None)
    params = lora.join(base, state.policy.params)
    sizes = (align.group_size, settings.max_new_tokens, align.prompts_at_once)
    generator.warm_up(job.generator, job.engine, params, *sizes, tuple(buckets))
    for k in buckets.values():
        arrays, extra = blank_arrays(job, k)
        parts = parts_of(job, state, arrays[0])
        seen = experience_of(job, reference, experience, state, arrays, extra | parts)
        update.lower(state, seen, base, **parts).compile()  # kept by `update`, which will find it


def training_reward(job: Job, scored: Scored, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(reward, valid) [P, G] of a scored rollout; normalised per task when the config says so."""
    features = scored.batch.features
    reward, method = scored.reward.welfare, job.settings.align.normalize
    if method != "none":
        reward = normalize_scores(reward, features.source, features.valid, method, len(TASKS))
    return np.asarray(reward).reshape(shape), np.asarray(features.valid).reshape(shape)
