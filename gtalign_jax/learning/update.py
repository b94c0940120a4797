"""One update of the policy (and critic) from one rollout's experience.

for each epoch, for each mini-batch of prompts:
    logp, entropy  = token_scores(policy, mini-batch)           prompt computed once per group
    gradient       = of policy_loss, summed over micro-batches, divided once
    policy         = AdamW step, skipped when the gradient is not finite, the KL limit is met, or
                     only the critic is warming up
    critic         = the same with value_loss, when there is one
then, when the algorithm says so, the KL coefficient and the reference move

The loop over mini-batches is either inside one program (`update`) or on the host, with micro-batches by token
count (`by_tokens`); its body is `learn_minibatch` in both.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gtalign_jax.errors import UserError
from gtalign_jax.learning import gradients
from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.learning.gradients import LossFn, Metrics, Sums
from gtalign_jax.learning.losses import adapt_kl_coef
from gtalign_jax.learning.spec import Spec
from gtalign_jax.learning.state import Optimizer
from gtalign_jax.learning.step_losses import policy_step_loss, value_step_loss
from gtalign_jax.models import lora
from gtalign_jax.types import Array, Experience, ModelState, PyTree, Ratio, TrainState


class Optimizers(NamedTuple):
    """The policy's and the critic's optimizer; None without a critic."""

    policy: Optimizer
    critic: Optimizer | None = None


class Summed(NamedTuple):
    """How a mini-batch's sums are made: (params, kl_coef) → `Sums` of the policy's loss, (params) → of the
    critic's."""

    policy: Callable[[PyTree, Array | None], Sums]
    critic: Callable[[PyTree], Sums]


class Steps(NamedTuple):
    """What sums lead to: `step_policy` and `step_critic` of an algorithm and its optimizers."""

    policy: Callable[[ModelState, Sums, Array, Array], tuple[ModelState, Array, Metrics]]
    critic: Callable[[ModelState, Sums], tuple[ModelState, Metrics]]


Carry = tuple[TrainState, Array]  # (state, stopped [] bool: the KL limit was met before)


def update(
    spec: Spec, optimizers: Optimizers, state: TrainState, experience: Experience, base: PyTree | None = None
) -> tuple[TrainState, Metrics]:
    """(state, metrics) after all updates from one rollout, as one program.

    base: what the policy's and the critic's adapters stand on when those are all that is trained
    (`models.lora`). Raises UserError when mini- or micro-batches do not divide the prompts.
    """
    config = spec.algorithm
    rng, rows = minibatch_rows(state.rng, experience.prompts.length.shape[0], config)
    carry = (state.replace(rng=rng, step=state.step + 1), jnp.zeros((), bool))
    steps = optimizer_steps(config, optimizers)

    def learn(carry: Carry, batch: Experience) -> tuple[Carry, Metrics]:
        return learn_minibatch(carry, whole_sums(spec, batch, base), steps)

    if rows is None:
        (state, _), metrics = learn(carry, experience)
    else:
        (state, _), metrics = jax.lax.scan(
            lambda carry, rows: learn(carry, jax.tree.map(lambda x: x[rows], experience)), carry, rows
        )
        metrics = {name: Ratio(m.total.sum(), m.count.sum()) for name, m in metrics.items()}
    return move_slow_parts(state, metrics, experience.completions.length.size, config)


def learn_minibatch(carry: Carry, sums: Summed, steps: Steps) -> tuple[Carry, Metrics]:
    """One mini-batch: the policy's step, and the critic's when there is one."""
    state, stopped = carry
    of_policy = sums.policy(state.policy.params, state.kl_coef)
    policy, stopped, metrics = steps.policy(state.policy, of_policy, state.step, stopped)
    state = state.replace(policy=policy)
    if state.critic is not None:
        critic, more = steps.critic(state.critic, sums.critic(state.critic.params))
        state, metrics = state.replace(critic=critic), metrics | more
    return (state, stopped), metrics


def whole_sums(spec: Spec, batch: Experience, base: PyTree | None) -> Summed:
    """The sums of a mini-batch cut into `algorithm.microbatches` equal parts."""
    parts = spec.algorithm.microbatches

    def policy(params: PyTree, kl_coef: Array | None) -> Sums:
        return gradients.accumulate(policy_loss_of(spec, base, kl_coef), params, batch, parts)

    def critic(params: PyTree) -> Sums:
        return gradients.accumulate(value_loss_of(spec, base), params, batch, parts)

    return Summed(policy, critic)


def policy_loss_of(spec: Spec, base: PyTree | None, kl_coef: Array | None) -> LossFn:
    """`policy_step_loss` as a function of (what is trained, batch)."""
    return on_base(functools.partial(policy_step_loss, spec=spec, kl_coef=kl_coef), base)


def value_loss_of(spec: Spec, base: PyTree | None) -> LossFn:
    """`value_step_loss` as a function of (what is trained, batch)."""
    return on_base(functools.partial(value_step_loss, spec=spec), lora.value_base(base))


def on_base(loss: LossFn, base: PyTree | None) -> LossFn:
    """The loss as a function of what is trained alone: adapters over a base, or all parameters."""
    return lambda trained, batch: loss(lora.join(base, trained), batch)


def optimizer_steps(config: AlgorithmConfig, optimizers: Optimizers) -> Steps:
    """The steps of an algorithm's policy and critic."""
    return Steps(
        functools.partial(step_policy, config, optimizers.policy),
        functools.partial(step_critic, optimizers.critic),
    )


def step_policy(
    config: AlgorithmConfig,
    optimizer: Optimizer,
    policy: ModelState,
    sums: Sums,
    step: Array,
    stopped: Array,
) -> tuple[ModelState, Array, Metrics]:
    """(policy, stopped, metrics) after a mini-batch: it stays while only the critic warms up, and once the
    KL to the rollout's policy exceeds its limit.

    step []: of this update, counted from 1. stopped [] bool: the limit was met before.
    """
    metrics = dict(sums.metrics)
    if config.kl_stop > 0:
        stopped |= metrics["kl/old"].value > config.kl_stop
        metrics["update/stopped"] = Ratio(stopped.astype(jnp.float32), jnp.ones(()))
    frozen = stopped | (step <= config.critic_warmup)
    policy, more = gradients.apply(policy, gradients.mean_gradient(sums), optimizer, frozen=frozen)
    return policy, stopped, metrics | more


def step_critic(optimizer: Optimizer, critic: ModelState, sums: Sums) -> tuple[ModelState, Metrics]:
    """(critic, metrics) after a mini-batch."""
    critic, more = gradients.apply(critic, gradients.mean_gradient(sums), optimizer, name="critic_")
    return critic, sums.metrics | more


def minibatch_rows(rng: Array, prompts: int, config: AlgorithmConfig) -> tuple[Array, Array | None]:
    """(rng of the next step, prompt numbers [epochs * minibatches, prompts / minibatches]).

    They are newly shuffled each epoch; None when one update takes all prompts as they are. UserError when
    the parts would not be equal.
    """
    rng, key = jax.random.split(rng)
    if prompts % config.minibatches:
        raise UserError(
            f"algorithm.minibatches={config.minibatches} must divide the {prompts} prompts of a rollout"
        )
    if config.on_policy:
        return rng, None
    keys = jax.random.split(key, config.epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, prompts))(keys)
    return rng, order.reshape(config.epochs * config.minibatches, -1)


def move_slow_parts(
    state: TrainState, metrics: Metrics, samples: int, config: AlgorithmConfig
) -> tuple[TrainState, Metrics]:
    """The KL coefficient follows the measured KL; the reference is refreshed when its time has come."""
    if state.kl_coef is not None:
        coef, metrics = next_kl_coef(state.kl_coef, metrics, samples, config)
        state = state.replace(kl_coef=coef)
    if state.reference is not None:
        state = state.replace(
            reference=next_reference(state.reference, state.policy.params, state.step, config)
        )
    return state, metrics


def next_kl_coef(
    coef: Array, metrics: Metrics, samples: int, config: AlgorithmConfig
) -> tuple[Array, Metrics]:
    """(the coefficient of the next step, metrics with the one of this step)."""
    metrics = metrics | {"kl/coef": Ratio(coef, jnp.ones(()))}
    moved = adapt_kl_coef(coef, metrics["kl/ref"].value, config.kl_target, config.kl_horizon, samples)
    # A step that was not finite says nothing about the KL.
    return jnp.where(jnp.isfinite(moved), moved, coef), metrics


def next_reference(reference: PyTree, policy: PyTree, step: Array, config: AlgorithmConfig) -> PyTree:
    """The policy's parameters where they are due, else the reference's."""
    due = step % config.reference_every == 0
    return jax.tree.map(lambda new, old: jnp.where(due, new, old), policy, reference)
