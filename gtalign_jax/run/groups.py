"""The groups of a training step: prompts, completions, what was read from them.

A step's prompts and random numbers are functions of (seed, k). With `align.overlap` the completions of step
k + 1 are written, by the policy before the update of step k, while those of step k are judged.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gtalign_jax.data import loader
from gtalign_jax.data.item import Item
from gtalign_jax.learning.advantages import informative_groups
from gtalign_jax.mesh import processes
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.buckets import bucket
from gtalign_jax.rollout.generator import generate
from gtalign_jax.rollout.spans import Tables, inside_block
from gtalign_jax.run.job import Job
from gtalign_jax.run.phase import Metrics
from gtalign_jax.run.score import Scored, finish_score, judge_share, score
from gtalign_jax.run.settings import Settings
from gtalign_jax.types import Array, PromptBatch, PyTree, Rollout

_informative = jax.jit(informative_groups)
REFILL_STRIDE = 1_000_003  # steps between a batch and the batches that refill it: never met in a run


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Scored groups: rollout (host arrays [P, G, ...]) and what was read from it [B].

    flat [P] bool: groups whose rewards are all equal, which teach nothing. untrained [P, G, N] bool:
    tokens of `config.align.untrained_blocks`.
    """

    rollout: Rollout
    scored: Scored
    flat: np.ndarray
    untrained: np.ndarray


def sample_groups(job: Job, params: PyTree, k: int) -> tuple[Sampled, Metrics]:
    """The groups of step k; with dynamic sampling, flat ones are replaced from further prompts (DAPO)."""
    algorithm = job.settings.algorithm
    sampled = draw(job, params, k, 0)
    first_flat, batches = sampled.flat.mean(), 1
    while algorithm.dynamic_sampling and sampled.flat.any() and batches <= algorithm.max_refills:
        sampled = refill(sampled, draw(job, params, k, batches))
        batches += 1
    metrics = {"group/zero_variance": first_flat}
    if algorithm.dynamic_sampling:
        metrics |= {"group/batches_drawn": batches, "group/flat_after_refill": sampled.flat.mean()}
    return sampled, metrics


def draw(job: Job, params: PyTree, k: int, refill_index: int) -> Sampled:
    """One batch of prompts, completed and scored: a function of (seed, k, refill_index)."""
    rollout, items = write(job, params, k + refill_index * REFILL_STRIDE)
    return _sampled(job, rollout, score(job, rollout, items))


def step_prompts(job: Job, step: int) -> tuple[PromptBatch, list[Item]]:
    """The prompts of a step and their items."""
    rows = loader.step_rows(len(job.train.items), job.settings.align.prompts, job.settings.data.seed, step)
    items = [job.train.items[i] for i in rows]
    return engine_lib.prompt_batch(job.engine, [job.train.tokens[i] for i in rows], rows), items


def steps_by_width(job: Job, first: int) -> dict[int, int]:
    """Prompt bucket → the first step from `first` on that meets it, refills included."""
    settings = job.settings
    refills = range(settings.algorithm.max_refills + 1 if settings.algorithm.dynamic_sampling else 1)
    steps = (k + r * REFILL_STRIDE for k in range(first, settings.align.steps) for r in refills)
    widths = [engine_lib.prompt_slots(job.engine, tokens) for tokens in job.train.tokens]
    return loader.steps_by_width(widths, settings.align.prompts, settings.data.seed, steps)


def write(job: Job, params: PyTree, step: int) -> tuple[Rollout, list[Item]]:
    """The completions of a step's prompts, on the host, and the items they answer."""
    key = jax.random.fold_in(jax.random.key(job.settings.seed + 2), step)
    prompts, items = step_prompts(job, step)
    return generate_in_parts(job, params, prompts, key), items


def _sampled(job: Job, rollout: Rollout, scored: Scored) -> Sampled:
    shape = rollout.length.shape
    valid = np.asarray(scored.batch.features.valid).reshape(shape)
    flat = ~np.asarray(_informative(scored.reward.welfare.reshape(shape), valid))
    return Sampled(rollout, scored, flat, untrained_tokens(rollout, job.untrained))


# --- one step ahead ------------------------------------------------------------------------------

_COMPLETIONS = ("completion", "length", "finished", "sampler_logp", "action_mask")


def sample_ahead(
    job: Job, params: PyTree, k: int, waiting: PyTree, last: bool
) -> tuple[Sampled, Metrics, PyTree]:
    """(the groups of step k, metrics, the completions of step k + 1), judging one and writing the other.

    waiting: the completions of step k, as this returned them before (`no_completions` at step 0, where they
    are written now). last: there is no step k + 1. What waits is part of a checkpoint: its policy is gone.
    """
    if k == 0:
        rollout, items = write(job, params, k)
    else:
        prompts, items = step_prompts(job, k)
        rollout = Rollout(prompts.tokens, prompts.length, **processes.fetch(waiting))
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="judge") as thread:
        share = thread.submit(judge_share, job, rollout, items)
        following = rollout if last else write(job, params, k + 1)[0]
        scored = finish_score(job, rollout, items, share.result())
    sampled = _sampled(job, rollout, scored)
    waiting = {name: np.asarray(getattr(following, name)) for name in _COMPLETIONS}
    return sampled, {"group/zero_variance": sampled.flat.mean()}, waiting


def no_completions(settings: Settings) -> dict[str, np.ndarray]:
    """What stands for completions that are not written yet, in their shapes [P, G, N]."""
    slots = bucket(settings.max_new_tokens, settings.buckets.completion, "completion", "max_new_tokens")
    shape = (settings.align.prompts, settings.align.group_size)
    kinds = dict(zip(_COMPLETIONS, (np.int32, np.int32, bool, np.float32, bool), strict=True))
    per_row = ("length", "finished")
    return {n: np.zeros(shape if n in per_row else (*shape, slots), kind) for n, kind in kinds.items()}


# --- parts of a batch ----------------------------------------------------------------------------


def untrained_tokens(rollout: Rollout, untrained: Sequence[Tables]) -> np.ndarray:
    """[P, G, N] bool: tokens of the blocks that earn no policy gradient."""
    inside = np.zeros(rollout.completion.shape, bool)
    for tables in untrained:
        inside |= inside_block(tables, rollout.completion)
    return inside


def generate_in_parts(job: Job, params: PyTree, prompts: PromptBatch, key: Array) -> Rollout:
    """The rollout of a batch on the host, `align.rollout_prompts` at a time: the same draws as at once."""
    align, budget, parts = job.settings.align, job.settings.max_new_tokens, []
    for first in range(0, align.prompts, align.prompts_at_once):
        part = jax.tree.map(lambda x, i=first: x[i : i + align.prompts_at_once], prompts)
        sizes = (align.group_size, budget)
        rollout = generate(job.generator, job.engine, params, part, key, *sizes, first_row=first)
        parts.append(jax.device_get(rollout))
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


def refill(sampled: Sampled, fresh: Sampled) -> Sampled:
    """Flat groups replaced by groups of `fresh` that are not, as far as they go."""
    prompts, group = sampled.rollout.length.shape
    places, good = np.flatnonzero(sampled.flat), np.flatnonzero(~fresh.flat)
    count = min(len(places), len(good))
    take = np.arange(prompts)
    take[places[:count]] = prompts + good[:count]
    if fresh.rollout.prompt.shape[1] != sampled.rollout.prompt.shape[1]:
        sampled, fresh = _same_width(sampled, fresh)
    samples = (take[:, None] * group + np.arange(group)).reshape(-1)
    pick = lambda rows: lambda a, b: _pick(a, b, rows)
    leaf = lambda x: not isinstance(x, dict) and not dataclasses.is_dataclass(x)
    return Sampled(
        rollout=jax.tree.map(pick(take), sampled.rollout, fresh.rollout),
        scored=_merge(sampled.scored, fresh.scored, pick(samples), leaf),
        flat=_pick(sampled.flat, fresh.flat, take),
        untrained=_pick(sampled.untrained, fresh.untrained, take),
    )


def _pick(first: Any, second: Any, rows: np.ndarray) -> Any:
    """Rows of two arrays, or two lists, laid end to end."""
    if isinstance(first, list):
        both = first + second
        return [both[i] for i in rows]
    return np.concatenate([first, second])[rows]


def _merge(first: Any, second: Any, pick: Callable[[Any, Any], Any], leaf: Callable[[Any], bool]) -> Any:
    """`pick` on every list and array of two like structures of dataclasses and dicts."""
    if leaf(first):
        return pick(first, second)
    if isinstance(first, dict):
        return {name: _merge(first[name], second[name], pick, leaf) for name in first}
    names = [field.name for field in dataclasses.fields(first)]
    merged = {n: _merge(getattr(first, n), getattr(second, n), pick, leaf) for n in names}
    return dataclasses.replace(first, **merged)


def _same_width(*parts: Sampled) -> tuple[Sampled, ...]:
    """The same groups with their prompts padded to one bucket."""
    width = max(part.rollout.prompt.shape[1] for part in parts)
    widen = lambda tokens: np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
    return tuple(
        dataclasses.replace(part, rollout=part.rollout.replace(prompt=widen(part.rollout.prompt)))
        for part in parts
    )
