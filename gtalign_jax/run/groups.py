"""The groups of a training step: prompts, completions, what was read from them.

A step's prompts and random numbers are functions of (seed, k). With `align.overlap` the completions of step
k + 1 are written, by the policy before the update of step k, while those of step k are judged.
"""

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gtalign_jax.data.item import Item
from gtalign_jax.data.order import REFILL_STRIDE
from gtalign_jax.errors import UserError
from gtalign_jax.learning.advantages import informative_groups
from gtalign_jax.learning.experience import reward_components
from gtalign_jax.mesh import processes
from gtalign_jax.mesh.memory import GENERATION, told
from gtalign_jax.mesh.sharding import place_batch
from gtalign_jax.rewards.normalize import normalize_scores
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generator
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.spans import Tables, inside_block
from gtalign_jax.run.job import Job
from gtalign_jax.run.phase import Metrics
from gtalign_jax.run.score import Scored, Share, judge_share, judge_stage, score, verdicts
from gtalign_jax.types import Batch, Completions, PromptBatch, PyTree, Rollout

_informative = jax.jit(informative_groups)


@dataclasses.dataclass(frozen=True)
class StepPrompts:
    """The prompts of a step (host arrays) and the items they ask."""

    step: int
    batch: PromptBatch
    items: list[Item]


def step_prompts(job: Job, step: int) -> StepPrompts:
    """The prompts of a step, a function of (seed, step)."""
    rows = job.feeds.prompts.batch(step)
    batch = engine_lib.prompt_batch(job.engine, [row.tokens for row in rows])
    return StepPrompts(step, batch, [row.item for row in rows])


def steps_by_width(job: Job, first: int) -> dict[int, int]:
    """Prompt bucket → the first step from `first` on that meets it, refills included."""
    settings = job.settings
    refills = range(settings.algorithm.max_refills + 1 if settings.algorithm.dynamic_sampling else 1)
    steps = (k + r * REFILL_STRIDE for k in range(first, settings.align.steps) for r in refills)
    return job.feeds.prompts.steps_by_width(steps)


def generate(
    job: Job, params: PyTree, prompts: StepPrompts, advance: Callable[[int], None] = lambda prompts: None
) -> Rollout:
    """The completions of a step's prompts, on the host, `align.rollout_prompts` at a time: the same draws as
    at once. advance: told how many prompts are answered, after each part."""
    align, parts = job.settings.align, []
    whole = Request(
        prompts=prompts.batch,
        key=jax.random.fold_in(jax.random.key(job.settings.seed + 2), prompts.step),
        group_size=align.group_size,
        max_new_tokens=job.settings.max_new_tokens,
    )
    for first in range(0, align.prompts, align.prompts_at_once):
        part = jax.tree.map(lambda x, i=first: x[i : i + align.prompts_at_once], prompts.batch)
        request = whole.replace(prompts=part, first_row=first)
        with told(GENERATION):
            parts.append(jax.device_get(generator.generate(job.generator, job.engine, params, request)))
        advance(first + align.prompts_at_once)
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


def written_before(prompts: StepPrompts, waiting: Completions) -> Rollout:
    """The rollout whose completions were written in the step before."""
    return Rollout(prompts.batch, processes.fetch(waiting))


def generate_ahead(job: Job, params: PyTree, k: int) -> Completions | None:
    """The completions of step k, host arrays, for the step before it to hand on; None when there is no such
    step. They are part of a checkpoint: the policy that wrote them is gone by then."""
    if k >= job.settings.align.steps:
        return None
    return jax.tree.map(np.asarray, generate(job, params, step_prompts(job, k)).completions)


@contextlib.contextmanager
def judging(
    job: Job, rollout: Rollout, items: Sequence[Item]
) -> Iterator[concurrent.futures.Future[Share | UserError]]:
    """This host's share of a rollout is judged on a thread while the block runs, or before, by a judge that
    uses the devices."""
    if job.mesh_judge is not None:
        share: concurrent.futures.Future[Share | UserError] = concurrent.futures.Future()
        with judge_stage(job, "judge on the mesh", rollout, verdicts(job)):
            share.set_result(judge_share(job, rollout, items))
        yield share
        return
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="judge") as thread:
        yield thread.submit(judge_share, job, rollout, items)


@dataclasses.dataclass(frozen=True)
class Groups:
    """A rollout (host arrays [P, G, ...]) and what was read from it; flat [P] bool: groups whose rewards are
    all equal, which teach nothing."""

    rollout: Rollout
    scored: Scored
    flat: np.ndarray


def grouped(rollout: Rollout, scored: Scored) -> Groups:
    """A scored rollout with its flat groups found."""
    shape = rollout.completions.length.shape
    valid = np.asarray(scored.batch.features.valid).reshape(shape)
    flat = ~np.asarray(_informative(scored.reward.welfare.reshape(shape), valid))
    return Groups(rollout, scored, flat)


def refill_flat(job: Job, params: PyTree, k: int, groups: Groups) -> tuple[Groups, Metrics]:
    """With dynamic sampling, flat groups are replaced from further prompts (DAPO): functions of (seed, k)."""
    algorithm = job.settings.algorithm
    metrics, batches = {"group/zero_variance": groups.flat.mean()}, 1
    if not algorithm.dynamic_sampling:
        return groups, metrics
    while groups.flat.any() and batches <= algorithm.max_refills:
        prompts = step_prompts(job, k + batches * REFILL_STRIDE)
        rollout = generate(job, params, prompts)
        groups = replace_flat(groups, grouped(rollout, score(job, rollout, prompts.items)))
        batches += 1
    return groups, metrics | {"group/batches_drawn": batches, "group/flat_after_refill": groups.flat.mean()}


def replace_flat(groups: Groups, fresh: Groups) -> Groups:
    """Flat groups replaced by fresh ones that are not, as far as they go."""
    prompts, group = groups.rollout.completions.length.shape
    places, good = np.flatnonzero(groups.flat), np.flatnonzero(~fresh.flat)
    count = min(len(places), len(good))
    take = np.arange(prompts)
    take[places[:count]] = prompts + good[:count]
    samples = (take[:, None] * group + np.arange(group)).reshape(-1)
    width = max(x.rollout.prompts.tokens.shape[1] for x in (groups, fresh))
    first, second = (_widened(x.rollout, width) for x in (groups, fresh))
    return Groups(
        rollout=jax.tree.map(lambda a, b: _pick(a, b, take), first, second),
        scored=_merge(groups.scored, fresh.scored, samples),
        flat=_pick(groups.flat, fresh.flat, take),
    )


def _pick(first: Any, second: Any, rows: np.ndarray) -> Any:
    """Rows of two arrays, or two lists, laid end to end."""
    if isinstance(first, list):
        both = first + second
        return [both[i] for i in rows]
    return np.concatenate([first, second])[rows]


def _merge(first: Any, second: Any, rows: np.ndarray) -> Any:
    """`_pick` on every list and array of two like structures of dataclasses and dicts; what is None stays."""
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: _merge(first[name], second[name], rows) for name in first}
    if not dataclasses.is_dataclass(first) or isinstance(first, type):
        return _pick(first, second, rows)
    names = [field.name for field in dataclasses.fields(first)]
    merged = {name: _merge(getattr(first, name), getattr(second, name), rows) for name in names}
    return dataclasses.replace(first, **merged)


def _widened(rollout: Rollout, width: int) -> Rollout:
    """The same rollout with its prompts padded to a wider bucket."""
    tokens = rollout.prompts.tokens
    tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
    return rollout.replace(prompts=rollout.prompts.replace(tokens=tokens))


def training_batch(job: Job, groups: Groups) -> Batch:
    """The batch of these groups, host arrays; rewards are normalised per task when the config says so."""
    rollout, scored, settings = groups.rollout, groups.scored, job.settings
    shape = rollout.completions.length.shape
    features, reward, components = scored.batch.features, scored.reward.welfare, None
    if settings.align.normalize != "none":
        method = settings.align.normalize
        reward = normalize_scores(reward, features.source, features.valid, method, len(job.tasks))
    if settings.algorithm.needs_components:
        parts = reward_components(scored.reward, settings.algorithm.components)
        components = np.asarray(parts).reshape(-1, *shape)
    return Batch(
        rollout,
        np.asarray(reward).reshape(shape),
        np.asarray(features.valid).reshape(shape),
        components,
        inside_blocks(rollout.completions, job.untrained) if job.untrained else None,
        inside_blocks(rollout.completions, job.response) if job.response else None,
    )


def blank_batch(job: Job, prompts: StepPrompts, completions: Completions) -> Batch:
    """What `training_batch` gives for these prompts, in shapes and types, with nothing written yet."""
    shape, algorithm = completions.length.shape, job.settings.algorithm
    components = np.zeros((len(algorithm.components), *shape), np.float32)
    return Batch(
        Rollout(prompts.batch, completions),
        np.zeros(shape, np.float32),
        np.zeros(shape, bool),
        components if algorithm.needs_components else None,
        np.zeros(completions.tokens.shape, bool) if job.untrained else None,
        np.zeros(completions.tokens.shape, bool) if job.response else None,
    )


def placed(batch: Batch, job: Job) -> Batch:
    """The batch on the mesh, its prompts spread; components [C, P, G] are small and stay whole."""
    rows = place_batch(batch.replace(components=None), job.mesh)
    return rows.replace(components=batch.components)


def inside_blocks(completions: Completions, blocks: Sequence[Tables]) -> np.ndarray:
    """[P, G, N] bool: tokens of these blocks."""
    inside = np.zeros(completions.tokens.shape, bool)
    for tables in blocks:
        inside |= inside_block(tables, completions.tokens)
    return inside
