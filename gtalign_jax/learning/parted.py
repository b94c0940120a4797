"""The update of a rollout in micro-batches by token count: less padding, the same numbers.

for each mini-batch of the plan (`rl.parts`):
    sums   = gradients and metrics of its micro-batches, a program call each, added in place
    policy = its step                                       as in `rl.update`
    critic = the same with its own sums, when there is one

There is one program for each shape of rows; all are compiled when prompts of a new width come first. The
host plans from lengths that it has, so nothing is fetched between the calls.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from gtalign_jax.learning import gradients
from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.learning.microbatches import Part, Plan, Shape, Sizes, plan_parts
from gtalign_jax.learning.state import Optimizer
from gtalign_jax.learning.update import (
    Metrics,
    minibatch_rows,
    next_kl_coef,
    next_reference,
    policy_step,
    step_losses,
)
from gtalign_jax.learning.vocabulary import LimitLogits
from gtalign_jax.mesh import processes
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.types import Array, Experience, Learner, Packing, PyTree, Ratio, Rollout, TrainState

_order = jax.jit(minibatch_rows, static_argnums=(1, 2))


def plan_update(config: AlgorithmConfig, rng: Array, rollout: Rollout, shards: int = 1) -> Plan:
    """The micro-batches of a rollout's updates, for a state with this rng; rollout: host arrays.

    Call it before the step's device work is started: the order of the mini-batches is fetched. Raises
    UserError when config.microbatch_tokens cannot hold a prompt on each of the shards.
    """
    prompts, group, width = rollout.completion.shape
    _, order = _order(rng, prompts, config)
    order = np.arange(prompts)[None] if order is None else processes.fetch(order)
    sizes = update_sizes(config, prompts, rollout.prompt.shape[1], group, width, shards)
    return plan_parts(np.asarray(rollout.length) + sizes.width - width, order, sizes)


def update_sizes(
    config: AlgorithmConfig, prompts: int, slots: int, group: int, width: int, shards: int
) -> Sizes:
    """What a plan depends on for P prompts of S = slots with G completions of N = width."""
    return Sizes(
        budget=config.microbatch_tokens,
        prompts=prompts // config.minibatches,
        slots=slots,
        group=group,
        # Where rows were cut short, the value after the last token is read too.
        width=width + (config.needs_critic and config.bootstrap_truncated),
        shards=shards,
    )


# --- sums over parts ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class PartSum:
    """Gradients and metrics of one learner's loss, added over micro-batches.

    loss_of: (base, kl_coef) → the loss of (trained params, batch).
    """

    loss_of: Callable[[PyTree, Array | None], gradients.LossFn]

    def over(
        self, parts: Sequence[Part], params: PyTree, seen: Experience, base: PyTree, coef: Array | None
    ) -> gradients.Sums:
        """The sums of these parts of an experience."""
        zeros, add = self.programs(params)
        sums = zeros(params, seen, base, coef)
        for part in parts:
            sums = add(part.shape, sums, params, seen, part.rows, part.start, base, coef)
        return sums

    def compile(self, parts: Sequence[Part], params: PyTree, seen, base, coef) -> None:
        """Make the programs that `over` calls for parts of these shapes."""
        zeros, add = self.programs(params)
        sums = zeros(params, seen, base, coef)
        for part in parts:
            add.lower(part.shape, sums, params, seen, part.rows, part.start, base, coef).compile()

    def programs(self, params: PyTree) -> tuple[Callable, Callable]:
        """(zeros, add) that leave the gradient laid out as the parameters, so that no call compiles again."""
        leaves, structure = jax.tree.flatten(params)
        return self._programs(tuple(leaf.sharding for leaf in leaves), structure)

    @functools.cache  # noqa: B019 - lives as long as the update that it belongs to
    def _programs(self, layout: tuple[Sharding, ...], structure: Any) -> tuple[Callable, Callable]:
        whole = _replicated(layout[0])
        out = gradients.Sums(structure.unflatten(layout), whole, whole)
        zeros = jax.jit(self._zeros, out_shardings=out)
        return zeros, jax.jit(self._add, static_argnums=0, donate_argnums=1, out_shardings=out)

    def _of_part(self, shape: Shape, params, seen, rows, start, base, coef) -> gradients.Sums:
        part = take_prompts(seen, rows).replace(packing=Packing(start, shape))
        held = (rows < len(seen.prompt))[:, None, None]
        part = part.replace(action_mask=part.action_mask & held)
        return gradients.part_sums(self.loss_of(base, coef), params, part)

    def _zeros(self, params, seen, base, coef) -> gradients.Sums:
        any_part = functools.partial(self._of_part, seen.completion.shape[1:])
        sums = jax.eval_shape(any_part, params, seen, *one_prompt(seen), base, coef)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)

    def _add(self, shape: Shape, sums: gradients.Sums, *args) -> gradients.Sums:
        return jax.tree.map(jnp.add, sums, self._of_part(shape, *args))


def take_prompts(tree: PyTree, rows: Array) -> PyTree:
    """Rows of arrays [P, ...]; for P and beyond, where there is none, the last one again."""
    return jax.tree.map(lambda x: x.at[rows].get(mode="clip"), tree)


def one_prompt(tree: Experience | Rollout) -> tuple[Array, Array]:
    """Rows and start of a part with the first prompt alone, in as many rows as completions."""
    _, group, width = tree.completion.shape
    return jnp.zeros(1, jnp.int32), width * jnp.arange(group, dtype=jnp.int32)[None]


def _replicated(like: Sharding) -> Sharding:
    return NamedSharding(like.mesh, PartitionSpec()) if isinstance(like, NamedSharding) else like


# --- the update ---------------------------------------------------------------------------------


def make_parted_update(
    model: ModelConfig,
    config: AlgorithmConfig,
    optimizer: Optimizer,
    critic_optimizer: Optimizer | None,
    temperature: float,
    limit: LimitLogits | None = None,
    old_from_sampler: bool = False,
) -> PartedUpdate:
    """`update.make_update` by parts: (state, experience, base=None, *, plan) → (state, metrics).

    plan: `plan_update` of the state's rng and the rollout. The state's arrays are donated.
    """
    policy_loss, value_loss = step_losses(model, config, temperature, limit, old_from_sampler)
    return PartedUpdate(
        config,
        PartSum(policy_loss),
        PartSum(lambda base, _: value_loss(base)),
        *learner_steps(config, optimizer, critic_optimizer),
        finish=jax.jit(functools.partial(_finish, config=config), static_argnums=2),
        refresh=jax.jit(functools.partial(next_reference, config=config), donate_argnums=0),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class PartedUpdate:
    """The programs of an update by parts. Called, it makes the update; `lower(...).compile()`, as of a jitted
    function, compiles what depends on the shapes of rows and prompts, and runs nothing."""

    config: AlgorithmConfig
    policy_sum: PartSum
    value_sum: PartSum
    step_policy: Callable
    step_critic: Callable
    finish: Callable
    refresh: Callable
    compiled: set[tuple[int, ...]] = dataclasses.field(default_factory=set)

    def __call__(
        self, state: TrainState, experience: Experience, base: PyTree | None = None, *, plan: Plan
    ) -> tuple[TrainState, Metrics]:
        self.lower(state, experience, base, plan=plan).compile()
        rng, step, stopped = _begin(state.rng, state.step)
        policy, critic, coef, found = state.policy, state.critic, self._coef(state), []
        for parts in plan.updates:
            sums = self.policy_sum.over(parts, policy.params, experience, base, coef)
            policy, stopped, metrics = self.step_policy(policy, sums, step, stopped)
            if critic is not None:
                sums = self.value_sum.over(parts, critic.params, experience, base, None)
                critic, more = self.step_critic(critic, sums)
                metrics |= more
            found.append(metrics)
        metrics, coef = self.finish(found, coef, experience.length.size)
        state = state.replace(policy=policy, critic=critic, rng=rng, step=step)
        if coef is not None:
            state = state.replace(kl_coef=coef)
        if getattr(state, "reference", None) is not None:
            state = state.replace(reference=self.refresh(state.reference, policy.params, step))
        return state, metrics

    def lower(
        self, state: TrainState, experience: Experience, base: PyTree | None = None, *, plan: Plan
    ) -> Ahead:
        """What `compile` of the result compiles, once for each width of prompts."""

        def compile_all() -> None:
            if experience.prompt.shape in self.compiled:
                return
            self.compiled.add(experience.prompt.shape)
            self.policy_sum.compile(plan.empty, state.policy.params, experience, base, self._coef(state))
            if state.critic is not None:
                self.value_sum.compile(plan.empty, state.critic.params, experience, base, None)

        return Ahead(compile_all)

    def _coef(self, state: TrainState) -> Array | None:
        return state.kl_coef if self.config.kl_target > 0 else None


class Ahead(NamedTuple):
    """Work for the compiler."""

    compile: Callable[[], None]


@jax.jit
def _begin(rng: Array, step: Array) -> tuple[Array, Array, Array]:
    """(rng of the next step, this update's number, stopped), as `make_update` begins."""
    return jax.random.split(rng)[0], step + 1, jnp.zeros((), bool)


def learner_steps(
    config: AlgorithmConfig, optimizer: Optimizer, critic_optimizer: Optimizer | None
) -> tuple[Callable, Callable]:
    """The jitted steps of policy and critic from their sums; the learner is donated."""

    def step_policy(policy: Learner, sums: gradients.Sums, step: Array, stopped: Array):
        grads = gradients.mean_gradient(sums)
        return policy_step(policy, grads, sums.metrics, step, stopped, config, optimizer)

    def step_critic(critic: Learner, sums: gradients.Sums):
        grads = gradients.mean_gradient(sums)
        critic, metrics = gradients.apply(critic, grads, critic_optimizer, name="critic_")
        return critic, sums.metrics | metrics

    return jax.jit(step_policy, donate_argnums=0), jax.jit(step_critic, donate_argnums=0)


def _finish(
    found: list[Metrics], coef: Array | None, samples: int, config: AlgorithmConfig
) -> tuple[Metrics, Array | None]:
    """(metrics summed over the mini-batches, the KL coefficient of the next step)."""
    add = lambda *ratios: Ratio(sum(r.total for r in ratios), sum(r.count for r in ratios))
    metrics = {name: add(*(one[name] for one in found)) for name in found[0]}
    if coef is None:
        return metrics, None
    coef, metrics = next_kl_coef(coef, metrics, samples, config)
    return metrics, coef
