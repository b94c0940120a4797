"""What the phases of a run, or of a plan, need of a device's memory as their settings change."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

from gtalign_jax.mesh import processes
from gtalign_jax.mesh.memory import GIB, device_bytes, taken
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.planning import programs, sizes
from gtalign_jax.planning.sizes import Say
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.generator import Shape, compile_largest, trainer_limit
from gtalign_jax.rollout.servers import EMBEDDED
from gtalign_jax.run.epochs import with_steps
from gtalign_jax.run.job import Job
from gtalign_jax.run.settings import Settings
from gtalign_jax.run.states import make_learner

Need = Callable[[Settings], float]


class Needs(NamedTuple):
    """Settings → bytes that a device needs for a phase's programs, with all that it holds meanwhile."""

    sft: Need
    update: Need
    rollout: Need


def needs_of_plan(model: ModelConfig, mesh: Mesh, say: Say) -> Needs:
    """Of the largest shapes that the settings allow, on chips that need not be here."""
    run = functools.partial(sizes.sized, limit=float("inf"), say=say)

    def sft(settings: Settings) -> float:
        return _most(sizes.sft_rows(settings, _computed(model, settings), mesh, run))

    def update(settings: Settings) -> float:
        learner = programs.planned_learner(settings, _computed(model, settings))
        return _most(sizes.learning_rows(settings, learner, mesh, run))

    def rollout(settings: Settings) -> float:
        if settings.engine.kind != EMBEDDED:
            return 0.0
        return _most(sizes.rollout_rows(settings, _computed(model, settings), mesh, run))

    return Needs(sft, update, rollout)


def needs_of_run(job: Job, say: Say) -> Needs:
    """Of the widest prompts that a job has, by the programs that it will run."""
    run = functools.partial(sizes.sized, limit=float("inf"), say=say)
    slots = functools.partial(engine_lib.prompt_slots, job.engine)
    any_width = job.settings.buckets.prompt[-1] if job.settings.data.streamed else 1
    shown = max((slots(row.prompt) for row in job.demonstrations), default=any_width)
    asked = max(map(slots, job.train.tokens), default=any_width)

    def learner_of(settings: Settings) -> Any:
        limit = trainer_limit(job.generator, settings.sampling, settings.max_new_tokens)
        return make_learner(settings, _computed(job.model, settings), limit)

    def sft(settings: Settings) -> float:
        settings = _widest(with_steps(settings, job.demonstrations), shown)
        return _agreed(_most(sizes.sft_rows(settings, _computed(job.model, settings), job.mesh, run)))

    def update(settings: Settings) -> float:
        settings = _widest(settings, asked)
        return _agreed(_most(sizes.learning_rows(settings, learner_of(settings), job.mesh, run)))

    def rollout(settings: Settings) -> float:
        align, model = settings.align, _computed(job.model, settings)
        beside = device_bytes(sizes.beside_generation(settings, learner_of(settings), job.mesh))
        shape = Shape(align.prompts_at_once, asked, align.group_size, settings.max_new_tokens)
        return _agreed(beside + generation_bytes(job, model, shape))

    return Needs(sft, update, rollout)


def generation_bytes(job: Job, model: ModelConfig, shape: Shape) -> float:
    """Bytes on a device while completions of this shape are written, the parameters among them."""
    found: list[float] = []

    def compiling(lowered: Lowered, beside: float) -> Compiled:
        compiled = lowered.compile()
        found.append(beside + taken(compiled))
        return compiled

    engine = dataclasses.replace(job.engine, model_config=model)
    params = programs.abstract_params(model, job.mesh, job.settings.lora)
    compile_largest(compiling, job.generator, engine, params, shape)
    if not found:  # servers generate
        return 0.0
    # The first program is given the parameters; those after it stand beside them.
    return max(found[0], device_bytes(params) + max(found[1:], default=0.0))


def _computed(model: ModelConfig, settings: Settings) -> ModelConfig:
    """The model computed as the settings say."""
    return dataclasses.replace(model, runtime=settings.start.runtime)


def _widest(settings: Settings, slots: int) -> Settings:
    """The settings with prompts of at most so many slots."""
    return dataclasses.replace(settings, buckets=dataclasses.replace(settings.buckets, prompt=(slots,)))


def _most(rows: Iterable[dict[str, Any]]) -> float:
    return GIB * max(row["hbm_gib"] for row in rows)


def _agreed(need: float) -> float:
    """The largest of all hosts' numbers."""
    return max(processes.all_gather(need))
