"""The alignment phase. One step reads top to bottom in `align_step`:

sampled    = groups of completions for the prompts of step k     a function of (seed, k)
reward     = their welfare, normalised per task if configured
experience = advantages, old and reference logprobs
state      = the update they lead to                             donated
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gtalign_jax import distributed
from gtalign_jax.data import loader
from gtalign_jax.evaluate import Scored, rollout_lines, score
from gtalign_jax.job import Job
from gtalign_jax.models import lora
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.heads import init_value_model
from gtalign_jax.phase import Metrics, Session, run_phase
from gtalign_jax.reporting.rollouts import write_rollouts
from gtalign_jax.rewards.normalize import normalize_scores
from gtalign_jax.rewards.tasks import TASKS
from gtalign_jax.rl.advantages import informative_groups
from gtalign_jax.rl.experience import make_experience, reward_components
from gtalign_jax.rl.update import make_update
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.spans import Tables, inside_block
from gtalign_jax.settings import Settings
from gtalign_jax.sharding import place_batch
from gtalign_jax.state import init_state, make_optimizer
from gtalign_jax.types import Array, Experience, PromptBatch, PyTree, Rollout, TrainState

_informative = jax.jit(informative_groups)
REFILL_STRIDE = 1_000_003  # steps between a batch and the batches that refill it: never met in a run


def run_align(job: Job, reference: PyTree, session: Session) -> PyTree:
    """The parameters after alignment; the reference is the policy it starts from, never changed.

    With adapters in it (`models.lora`), the adapters alone are trained: the policy's go on from the
    reference's, and both stand on the same base.
    """
    settings = job.settings
    if not settings.align.steps:
        return reference
    optimizer, critic_optimizer = optimizers(settings)
    temperature = settings.sampling.temperature
    update = make_update(job.model, settings.algorithm, optimizer, critic_optimizer, temperature)
    fixed = {"model": job.model, "config": settings.algorithm, "temperature": temperature}
    experience = jax.jit(functools.partial(make_experience, **fixed))
    step = functools.partial(align_step, job, reference, experience, update)
    trained, base = lora.split(reference)
    state = start_state(settings, job.model, trained)
    return lora.join(base, run_phase(session, "align", state, settings.align.steps, step).policy.params)


def optimizers(settings: Settings) -> tuple[Any, Any]:
    """The policy's and the critic's optimizer (None without a critic) over all updates of the phase."""
    algorithm = settings.algorithm
    updates = settings.align.steps * algorithm.epochs * algorithm.minibatches
    critic = make_optimizer(settings.critic_optimizer, updates) if algorithm.needs_critic else None
    return make_optimizer(settings.policy_optimizer, updates), critic


def start_state(settings: Settings, model: ModelConfig, reference: PyTree) -> TrainState:
    """The state at step 0: the policy is a copy of the reference, and the critic starts from its trunk.

    reference: what is trained of it (`lora.split`); with adapters, policy and critic are adapters only.
    """
    algorithm = settings.algorithm
    optimizer, critic_optimizer = optimizers(settings)
    copy = lambda: jax.tree.map(jnp.copy, reference)  # the state is donated, the reference must live on
    critic = (init_value_model(copy(), model), critic_optimizer) if algorithm.needs_critic else None
    return init_state(
        jax.random.key(settings.seed + 1),
        copy(),
        optimizer,
        critic,
        kl_coef=algorithm.kl_coef if algorithm.kl_target > 0 else None,
        reference=reference if algorithm.reference_every > 0 else None,
    )


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


def align_step(
    job: Job,
    reference: PyTree,
    experience: Callable[..., Experience],
    update: Callable,
    state: TrainState,
    k: int,
) -> tuple[TrainState, Metrics]:
    """One rollout and the update it leads to."""
    settings, (start, base) = job.settings, lora.split(reference)
    before = distributed.total(job.judge_stats.numbers())
    sampled, drawn = sample_groups(job, lora.join(base, state.policy.params), k)
    rollout, scored = sampled.rollout, sampled.scored
    arrays = place_batch((rollout, *training_reward(job, scored, rollout.length.shape)), job.mesh)
    critic = None if state.critic is None else state.critic.params
    extra: dict[str, Any] = {}
    if job.untrained:
        extra["untrained"] = place_batch(sampled.untrained, job.mesh)
    if settings.algorithm.needs_components:
        parts = np.asarray(reward_components(scored.reward, settings.algorithm.components))
        extra["components"] = parts.reshape(-1, *rollout.length.shape)
    if settings.algorithm.kl_target > 0:
        extra["kl_coef"] = state.kl_coef
    moving = getattr(state, "reference", None)
    models = (state.policy.params, start if moving is None else moving, critic)
    seen = experience(*arrays, *models, base=base, **extra)
    state, metrics = update(state, seen, base)
    dumps = k % settings.align.dump_every == 0 or k + 1 == settings.align.steps
    if dumps and distributed.is_main():
        write_rollouts(job.workdir, "train", k, rollout_lines(job, rollout, scored, k))
    after = distributed.total(job.judge_stats.numbers())
    peaks = {"max_in_flight"}  # the other counters are sums: what this step added
    judged = {f"judge/{k}": n - (0.0 if k in peaks else before.get(k, 0.0)) for k, n in after.items()}
    return state, metrics | judged | drawn | rollout_metrics(sampled)


def training_reward(job: Job, scored: Scored, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(reward, valid) [P, G] of a scored rollout; normalised per task when the config says so."""
    features = scored.batch.features
    reward, method = scored.reward.welfare, job.settings.align.normalize
    if method != "none":
        reward = normalize_scores(reward, features.source, features.valid, method, len(TASKS))
    return np.asarray(reward).reshape(shape), np.asarray(features.valid).reshape(shape)


# --- sampling ------------------------------------------------------------------------------------


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
    align, step = job.settings.align, k + refill_index * REFILL_STRIDE
    rows = loader.step_rows(len(job.train.items), align.prompts, job.settings.data.seed, step)
    items = [job.train.items[i] for i in rows]
    prompts = engine_lib.prompt_batch(job.engine, [job.train.tokens[i] for i in rows], rows)
    key = jax.random.fold_in(jax.random.key(job.settings.seed + 2), step)
    rollout = generate_in_parts(job, params, prompts, key)
    scored = score(job, rollout, items)
    shape = rollout.length.shape
    valid = np.asarray(scored.batch.features.valid).reshape(shape)
    flat = ~np.asarray(_informative(scored.reward.welfare.reshape(shape), valid))
    return Sampled(rollout, scored, flat, untrained_tokens(rollout, job.untrained))


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
        rollout = engine_lib.rollout(job.engine, params, part, key, *sizes, first_row=first)
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


# --- metrics -------------------------------------------------------------------------------------


def rollout_metrics(sampled: Sampled) -> Metrics:
    """What the completions of a step were like; samples without a verdict count in no mean of a reward."""
    scored, rollout = sampled.scored, sampled.rollout
    f, action, reward = scored.batch.features, scored.batch.action, scored.reward
    valid = np.asarray(f.valid)
    metrics = {
        "reward/format": (f.format_ok & f.payoff_ok).mean(),
        "reward/frontier": f.frontier.mean(),
        "length/mean": rollout.length.mean(),
        "length/truncated": 1.0 - rollout.finished.mean(),
        "judge/missing": 1.0 - valid.mean(),
        "tokens": int(rollout.length.sum()),
    }
    metrics |= {f"action/{name}": float(np.mean([a == name for a in action])) for name in ("DA", "CQ", "AQ")}
    tasks = np.array([item.task for item in scored.items])
    values = {"welfare": reward.welfare, "user": reward.user, "llm": reward.llm}
    for name, value in (values | {"answer": scored.batch.answer}).items():
        if valid.any():
            metrics[f"reward/{name}"] = value[valid].mean()
    for task in sorted(set(tasks[valid])):
        mine = valid & (tasks == task)
        metrics |= {f"reward/{name}/{task}": value[mine].mean() for name, value in values.items()}
    return metrics
