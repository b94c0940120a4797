"""Experience and update of a rollout in micro-batches by token count: less padding, the same numbers.

for each mini-batch of the schedule (`microbatches`):
    sums   = gradients and metrics of its micro-batches, a program call each, added in place
    state  = `update.learn_minibatch`

There is one program for each shape of rows; all are compiled when prompts of a new width come first. The
host schedules from lengths that it has, so nothing is fetched between the calls.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.stages import Wrapped

from gtalign_jax.learning import gradients
from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.learning.gradients import Metrics, Sums
from gtalign_jax.learning.microbatches import MicroBatch, Schedule, Sizes, plan_schedule
from gtalign_jax.learning.scores import Scores, score_rollout
from gtalign_jax.learning.spec import Spec
from gtalign_jax.learning.update import (
    Optimizers,
    Steps,
    Summed,
    learn_minibatch,
    minibatch_rows,
    next_kl_coef,
    next_reference,
    optimizer_steps,
    policy_loss_of,
    value_loss_of,
)
from gtalign_jax.mesh import processes
from gtalign_jax.mesh.memory import PART, compile_to_fit
from gtalign_jax.types import (
    Array,
    Completions,
    Experience,
    Models,
    Packing,
    PyTree,
    Ratio,
    Rollout,
    TrainState,
)

_order = jax.jit(minibatch_rows, static_argnums=(1, 2))


def schedule_of(
    config: AlgorithmConfig, rng: Array, slots: int, completions: Completions, shards: int = 1
) -> Schedule:
    """The micro-batches of a rollout's updates, for a state with this rng.

    slots: S of the prompts. completions: host arrays. Call it before the step's device work is started: the
    order of the mini-batches is fetched. Raises UserError when config.microbatch_tokens cannot hold a prompt
    on each of the shards.
    """
    prompts, group, width = completions.tokens.shape
    _, order = _order(rng, prompts, config)
    order = np.arange(prompts)[None] if order is None else processes.fetch(order)
    sizes = schedule_sizes(config, (prompts, slots, group, width), shards)
    return plan_schedule(np.asarray(completions.length) + sizes.width - width, order, sizes)


def schedule_sizes(config: AlgorithmConfig, shape: tuple[int, int, int, int], shards: int) -> Sizes:
    """What a schedule depends on for shape (P, S, G, N)."""
    prompts, slots, group, width = shape
    return Sizes(
        budget=config.microbatch_tokens,
        prompts=prompts // config.minibatches,
        slots=slots,
        group=group,
        # Where rows were cut short, the value after the last token is read too.
        width=width + (config.needs_critic and config.bootstrap_truncated),
        shards=shards,
    )


class Fold(NamedTuple):
    """A result of a whole batch that is made of those of its micro-batches, a program call each.

    of_part: (spec, micro-batch, packing, held [P_b] bool, *args) → its result. rows: the result has a row a
    prompt, put where the prompt is; else results are added up.
    """

    of_part: Callable[..., PyTree]
    spec: Spec
    rows: bool


@dataclasses.dataclass(frozen=True, eq=False)
class FoldPrograms:
    """start(batch, *args): zeros. add(shape, carry, batch, rows, start, *args): a micro-batch's result in it.

    compiled: the shapes of prompts and completions for which every `add` is there.
    """

    start: Callable[..., PyTree]
    add: Wrapped
    compiled: set[tuple[tuple[int, ...], ...]] = dataclasses.field(default_factory=set)


def fold(
    made: FoldPrograms, parts: Sequence[MicroBatch], batch: Experience | Rollout, *args: PyTree
) -> PyTree:
    """The result over these micro-batches of a batch."""
    carry = made.start(batch, *args)
    for part in parts:
        carry = made.add(part.shape, carry, batch, part.rows, part.start, *args)
    return carry


def compile_fold(
    made: FoldPrograms, parts: Sequence[MicroBatch], batch: Experience | Rollout, *args: PyTree
) -> None:
    """Make the programs that `fold` calls for micro-batches of these shapes, once for each shape of batch."""
    shapes = batch.prompts.tokens.shape, batch.completions.tokens.shape
    if shapes in made.compiled:
        return
    made.compiled.add(shapes)
    carry = made.start(batch, *args)
    for part in parts:
        lowered = made.add.lower(part.shape, carry, batch, part.rows, part.start, *args)
        compile_to_fit(lowered, PART)


@functools.lru_cache(maxsize=32)
def fold_programs(of: Fold, layout: tuple[Sharding, ...], structure: Any) -> FoldPrograms:
    """The programs of a fold whose result is laid out so, so that no call compiles again for another's
    layout."""
    out, (begin, add) = structure.unflatten(layout), fold_functions(of)
    return FoldPrograms(
        jax.jit(begin, out_shardings=out),
        jax.jit(add, static_argnums=0, donate_argnums=1, out_shardings=out),
    )


@functools.lru_cache(maxsize=32)
def fold_functions(of: Fold) -> tuple[Callable[..., PyTree], Callable[..., PyTree]]:
    """start and add of `FoldPrograms` before they are compiled.

    The same two for every layout: a step writes P(None, None) as P(), and what was compiled for the one is
    found for the other.
    """

    def part_of(shape: tuple[int, int], batch: PyTree, rows: Array, start: Array, *args: PyTree) -> PyTree:
        held = rows < batch.prompts.length.shape[0]
        return of.of_part(of.spec, take_prompts(batch, rows), Packing(start, shape), held, *args)

    def begin(batch: PyTree, *args: PyTree) -> PyTree:
        shape = batch.completions.tokens.shape[1:]
        found = jax.eval_shape(functools.partial(part_of, shape), batch, *one_prompt(batch), *args)
        prompts = (batch.prompts.length.shape[0],) if of.rows else ()
        return jax.tree.map(lambda x: jnp.zeros((*prompts, *x.shape[len(prompts) :]), x.dtype), found)

    def add(
        shape: tuple[int, int], carry: PyTree, batch: PyTree, rows: Array, start: Array, *args: PyTree
    ) -> PyTree:
        found = part_of(shape, batch, rows, start, *args)
        if of.rows:
            return jax.tree.map(lambda x, new: x.at[rows].set(new, mode="drop"), carry, found)
        return jax.tree.map(jnp.add, carry, found)

    return begin, add


def take_prompts(tree: PyTree, rows: Array) -> PyTree:
    """Rows of arrays [P, ...]; for P and beyond, where there is none, the last one again."""
    return jax.tree.map(lambda x: x.at[rows].get(mode="clip"), tree)


def one_prompt(batch: Experience | Rollout) -> tuple[Array, Array]:
    """Rows and start of a micro-batch with the first prompt alone, in as many rows as completions."""
    _, group, width = batch.completions.tokens.shape
    return jnp.zeros(1, jnp.int32), width * jnp.arange(group, dtype=jnp.int32)[None]


def score_part(spec: Spec, part: Rollout, packing: Packing, held: Array, models: Models) -> Scores:
    """What the models say of a micro-batch."""
    del held  # rows of no prompt are dropped
    return score_rollout(spec, models, part, packing)


def score_programs(spec: Spec, layout: Sharding) -> FoldPrograms:
    """The scores of a rollout laid out so."""
    return fold_programs(Fold(score_part, spec, rows=True), (layout,), jax.tree.structure(0))


def score_by_tokens(spec: Spec, models: Models, rollout: Rollout, schedule: Schedule) -> Scores:
    """`scores.score_rollout` by the micro-batches of the first pass over the rollout."""
    made = score_programs(spec, rollout.completions.tokens.sharding)
    compile_fold(made, schedule.empty, rollout, models)
    parts = [part for parts in schedule.updates[: spec.algorithm.minibatches] for part in parts]
    return fold(made, parts, rollout, models)


def policy_sums(
    spec: Spec, part: Experience, packing: Packing, held: Array, params: PyTree, *given: PyTree
) -> Sums:
    """Gradient and metrics of the policy's loss of a micro-batch; given: base, kl_coef."""
    return gradients.part_sums(policy_loss_of(spec, *given), params, _held(part, packing, held))


def value_sums(
    spec: Spec, part: Experience, packing: Packing, held: Array, params: PyTree, base: PyTree | None
) -> Sums:
    """Gradient and metrics of the critic's loss of a micro-batch."""
    return gradients.part_sums(value_loss_of(spec, base), params, _held(part, packing, held))


def _held(part: Experience, packing: Packing, held: Array) -> Experience:
    mask = part.completions.action_mask & held[:, None, None]
    return part.replace(packing=packing, completions=part.completions.replace(action_mask=mask))


def sum_programs(spec: Spec, of_part: Callable[..., Sums], params: PyTree) -> FoldPrograms:
    """Sums whose gradient is laid out as the parameters."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, params)
    whole: PyTree = _replicated(jax.tree.leaves(layout)[0])  # of the count, and of each metric
    leaves, structure = jax.tree.flatten(Sums(layout, whole, whole))
    return fold_programs(Fold(of_part, spec, rows=False), tuple(leaves), structure)


def _replicated(like: Sharding) -> Sharding:
    return NamedSharding(like.mesh, PartitionSpec()) if isinstance(like, NamedSharding) else like


def update_by_tokens(
    spec: Spec,
    optimizers: Optimizers,
    state: TrainState,
    experience: Experience,
    base: PyTree | None,
    schedule: Schedule,
) -> tuple[TrainState, Metrics]:
    """`update.update` by the micro-batches of a schedule (`schedule_of`). The state's arrays are donated."""
    compile_sums(spec, state, experience, base, schedule)
    rng, step, stopped = _begin(state.rng, state.step)
    carry, found = (state.replace(rng=rng, step=step), stopped), []
    steps = Steps(*jitted_steps(spec.algorithm, optimizers))
    for parts in schedule.updates:
        carry, metrics = learn_minibatch(carry, _sums_over(spec, parts, experience, base), steps)
        found.append(metrics)
    state, _ = carry
    metrics, coef = _finish(found, state.kl_coef, experience.completions.length.size, spec.algorithm)
    state = state.replace(kl_coef=coef)
    if state.reference is not None:
        moved = _refresh(state.reference, state.policy.params, step, spec.algorithm)
        state = state.replace(reference=moved)
    return state, metrics


def compile_update(
    spec: Spec,
    optimizers: Optimizers,
    state: TrainState,
    experience: Experience,
    base: PyTree | None,
    schedule: Schedule,
) -> None:
    """Make all that `update_by_tokens` runs, which consumes nothing and runs no gradient."""
    compile_sums(spec, state, experience, base, schedule)
    _, step, stopped = _begin(state.rng, state.step)
    policy, critic = map(_ahead, jitted_steps(spec.algorithm, optimizers))
    steps = Steps(policy, critic)
    zeros = _sums_over(spec, (), experience, base)
    (after, _), metrics = learn_minibatch((state.replace(step=step), stopped), zeros, steps)
    found = [metrics] * len(schedule.updates)
    _ahead(_finish)(found, state.kl_coef, experience.completions.length.size, spec.algorithm)
    if state.reference is not None:
        _ahead(_refresh)(state.reference, after.policy.params, step, spec.algorithm)


def _ahead(program: Wrapped) -> Callable[..., PyTree]:
    """The program compiled instead of run: what it gives are the shapes and layouts of its results."""

    def compiled(*args: Any) -> PyTree:
        traced = program.trace(*args)
        layout = traced.lower().compile().output_shardings
        return jax.tree.map(lambda x, where: x.update(sharding=where), traced.out_info, layout)

    return compiled


def compile_sums(
    spec: Spec, state: TrainState, experience: Experience, base: PyTree | None, schedule: Schedule
) -> None:
    """Make the programs of `update_by_tokens` that depend on the shapes of rows and prompts."""
    params = state.policy.params
    made = sum_programs(spec, policy_sums, params)
    compile_fold(made, schedule.empty, experience, params, base, state.kl_coef)
    if state.critic is not None:
        params = state.critic.params
        compile_fold(sum_programs(spec, value_sums, params), schedule.empty, experience, params, base)


def _sums_over(
    spec: Spec, parts: Sequence[MicroBatch], experience: Experience, base: PyTree | None
) -> Summed:
    """The sums of a mini-batch's micro-batches."""

    def policy(params: PyTree, kl_coef: Array | None) -> Sums:
        return fold(sum_programs(spec, policy_sums, params), parts, experience, params, base, kl_coef)

    def critic(params: PyTree) -> Sums:
        return fold(sum_programs(spec, value_sums, params), parts, experience, params, base)

    return Summed(policy, critic)


@functools.lru_cache(maxsize=32)
def jitted_steps(config: AlgorithmConfig, optimizers: Optimizers) -> tuple[Wrapped, Wrapped]:
    """`optimizer_steps`, each a program that takes its model state over."""
    policy, critic = optimizer_steps(config, optimizers)
    return jax.jit(policy, donate_argnums=0), jax.jit(critic, donate_argnums=0)


@jax.jit
def _begin(rng: Array, step: Array) -> tuple[Array, Array, Array]:
    """(rng of the next step, this update's number, stopped), as `update.update` begins."""
    return jax.random.split(rng)[0], step + 1, jnp.zeros((), bool)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _finish(
    found: list[Metrics], coef: Array | None, samples: int, config: AlgorithmConfig
) -> tuple[Metrics, Array | None]:
    """(metrics summed over the mini-batches, the KL coefficient of the next step)."""
    metrics = {
        name: Ratio(sum(one[name].total for one in found), sum(one[name].count for one in found))
        for name in found[0]
    }
    if coef is None:
        return metrics, None
    coef, metrics = next_kl_coef(coef, metrics, samples, config)
    return metrics, coef


_refresh = jax.jit(next_reference, static_argnums=3, donate_argnums=0)
