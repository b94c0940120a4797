"""The alignment phase. One step reads top to bottom in `align_step`:

prompts    = the prompts of step k                               a function of (seed, k)
rollout    = their completions, or those written in the step before
scored     = decoded, judged, rewarded; meanwhile step k + 1 is written, with `align.overlap`
batch      = the groups that are learnt from, flat ones drawn again with dynamic sampling
experience = advantages, old and reference logprobs
state      = the update they lead to                             donated
"""

import functools

from gtalign_jax.learning.learner import Learner
from gtalign_jax.mesh import processes
from gtalign_jax.mesh.sharding import batch_shards, spread
from gtalign_jax.models import lora
from gtalign_jax.rollout import generator
from gtalign_jax.rollout.generator import Shape, hand_over
from gtalign_jax.run.groups import (
    blank_batch,
    generate,
    generate_ahead,
    grouped,
    judging,
    placed,
    refill_flat,
    step_prompts,
    steps_by_width,
    training_batch,
    written_before,
)
from gtalign_jax.run.job import Job
from gtalign_jax.run.phase import Metrics, Phase, Session, run_phase
from gtalign_jax.run.progress import stage
from gtalign_jax.run.rollouts import write_rollouts
from gtalign_jax.run.score import SLOW, judge_stage, rollout_lines, score, verdicts
from gtalign_jax.run.states import align_state, make_learner, no_completions
from gtalign_jax.run.step_metrics import counted, counters, rollout_metrics
from gtalign_jax.types import Models, PyTree, TrainState


def run_align(job: Job, start: PyTree, session: Session) -> PyTree:
    """The parameters after alignment; `start` is the reference too, and is never changed.

    With adapters in it (`models.lora`), the adapters alone are trained: the policy's go on from the
    reference's, and both stand on the same base.
    """
    settings = job.settings
    if not settings.align.steps:
        return start
    limit = generator.trainer_limit(job.generator, settings.sampling, settings.max_new_tokens)
    learner = make_learner(settings, job.model, limit)
    reference, base = lora.split(start)
    phase = Phase(
        "align",
        settings.align.steps,
        functools.partial(align_step, job, learner, reference, base),
        functools.partial(warm_up, job, learner, reference, base) if settings.start.warm_up else None,
        feed=job.feeds.prompts,
    )
    state = run_phase(session, phase, align_state(settings, learner, reference))
    return lora.join(base, state.policy.params)


def align_step(
    job: Job, learner: Learner, reference: PyTree, base: PyTree | None, state: TrainState, k: int
) -> tuple[TrainState, Metrics]:
    """One rollout and the update it leads to."""
    settings, before, last = job.settings, counters(job), k + 1 == job.settings.align.steps
    models = models_of(state, reference, base)
    params = lora.join(base, state.policy.params)
    hand_over(job.generator, job.engine, params, due=k % settings.engine.push_every == 0)

    prompts = step_prompts(job, k)
    waiting = state.waiting if settings.align.overlap and k > 0 else None
    with stage(f"align step {k}: generate", settings.align.prompts, after=SLOW) as advance:
        if waiting is None:
            rollout = generate(job, params, prompts, advance)
        else:
            rollout = written_before(prompts, waiting)
    first = verdicts(job)
    with judging(job, rollout, prompts.items) as share:
        following = generate_ahead(job, params, k + 1) if settings.align.overlap else None
        with judge_stage(job, f"align step {k}: judge", rollout, first):
            judged = share.result()
    scored = score(job, rollout, prompts.items, judged)
    groups, drawn = refill_flat(job, params, k, grouped(rollout, scored))
    batch = training_batch(job, groups)
    schedule = learner.schedule(state.rng, batch.rollout, batch_shards(job.mesh))
    experience = learner.experience(models, placed(batch, job), state.kl_coef, schedule)
    state, metrics = learner.update(state.replace(waiting=None), experience, base, schedule)

    if settings.align.overlap:
        following = rollout.completions if following is None else following
        state = state.replace(waiting=spread(following, job.mesh))
    if (last or k % settings.align.dump_every == 0) and processes.is_main():
        write_rollouts(job.workdir, "train", k, rollout_lines(groups.rollout, groups.scored, k))
    counts, written = counted(before, counters(job)), rollout_metrics(groups.rollout, groups.scored)
    return state, {**metrics, **counts, **drawn, **written}


def models_of(state: TrainState, reference: PyTree, base: PyTree | None) -> Models:
    """The models that a step asks; the reference is the state's own where the algorithm refreshes it."""
    critic = None if state.critic is None else state.critic.params
    return Models(
        state.policy.params, reference if state.reference is None else state.reference, critic, base
    )


def warm_up(
    job: Job, learner: Learner, reference: PyTree, base: PyTree | None, state: TrainState, first: int
) -> None:
    """Compile what the steps from `first` on will run, in every bucket of prompts that they meet.

    Generation and experience run once on nothing; the update, which would consume the state, does not run.
    """
    settings, buckets = job.settings, steps_by_width(job, first)
    align, state = settings.align, state.replace(waiting=None)
    models = models_of(state, reference, base)
    params = lora.join(base, state.policy.params)
    if job.mesh_judge is not None:  # first, for it takes memory from all that follows
        met = (item for k in buckets.values() for item in step_prompts(job, k).items)
        job.mesh_judge.warm_up(job.train.items or met)  # a stream's are known as far as it was read
    for i, width in enumerate(sorted(buckets), 1):
        shape = Shape(align.prompts_at_once, width, align.group_size, settings.max_new_tokens)
        with stage(f"compile generation, {i} of {len(buckets)}"):
            generator.warm_up(job.generator, job.engine, params, shape)
    for i, k in enumerate(buckets.values(), 1):
        batch = blank_batch(job, step_prompts(job, k), no_completions(settings))
        schedule = learner.schedule(state.rng, batch.rollout, batch_shards(job.mesh))
        with stage(f"compile alignment, {i} of {len(buckets)}"):
            learner.compile(state, models, placed(batch, job), schedule)
