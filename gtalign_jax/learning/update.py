"""One update of the policy (and critic) from one rollout's experience.

for each epoch, for each mini-batch of prompts:
    logp, entropy  = token_scores(policy, mini-batch)           prompt computed once per group
    gradient       = of policy_loss, summed over micro-batches, divided once
    policy         = AdamW step, skipped when the gradient is not finite, the KL limit is met, or
                     only the critic is warming up
    critic         = the same with value_loss, when there is one
then, when the algorithm says so, the KL coefficient and the reference move
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gtalign_jax.errors import UserError
from gtalign_jax.learning import gradients
from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.learning.logprobs import Objective, token_scores
from gtalign_jax.learning.losses import (
    adapt_kl_coef,
    kl_estimate,
    loss_weights,
    policy_loss,
    policy_terms,
    value_loss,
)
from gtalign_jax.learning.packing import in_packed_rows
from gtalign_jax.learning.state import AlignState, Optimizer, Streamed
from gtalign_jax.learning.vocabulary import LimitLogits, Reading
from gtalign_jax.models import lora
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.heads import token_values
from gtalign_jax.types import Array, Experience, Learner, PyTree, Ratio, TrainState

Metrics = dict[str, Ratio]


def make_update(
    model: ModelConfig,
    config: AlgorithmConfig,
    optimizer: optax.GradientTransformation,
    critic_optimizer: optax.GradientTransformation | None,
    temperature: float,
    limit: LimitLogits | None = None,
    old_from_sampler: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted update of one algorithm: (state, experience, base=None) → (state, metrics).

    The state is donated. base: what the policy's and the critic's adapters stand on when those are all that
    is trained (`models.lora`); it is an argument that stays as it is, shared by policy, critic and reference.

    An algorithm with kl_target or reference_every needs an `AlignState` (see `state.init_state`). Raises
    UserError at the first call when mini- or micro-batches do not divide the prompts, and for moments in the
    host's memory with several mini-batches.
    """
    streamed = any(isinstance(each, Streamed) for each in (optimizer, critic_optimizer))
    if streamed and not config.on_policy:
        raise UserError(
            "config.policy_optimizer.offload, config.critic_optimizer.offload: with algorithm.epochs or "
            "minibatches over 1 they need algorithm.microbatch_tokens; set it"
        )
    policy_loss_of, value_loss_of = step_losses(model, config, temperature, limit, old_from_sampler)

    def minibatch(carry: tuple[TrainState, Array], batch: Experience, base: PyTree | None):
        state, stopped = carry
        loss = policy_loss_of(base, state.kl_coef if config.kl_target > 0 else None)
        grads, metrics = gradients.accumulate(loss, state.policy.params, batch, config.microbatches)
        policy, stopped, metrics = policy_step(
            state.policy, grads, metrics, state.step, stopped, config, optimizer
        )
        critic = state.critic
        if critic is not None:
            loss = value_loss_of(base)
            grads, value_metrics = gradients.accumulate(loss, critic.params, batch, config.microbatches)
            critic, step_metrics = gradients.apply(critic, grads, critic_optimizer, name="critic_")
            metrics |= value_metrics | step_metrics
        return (state.replace(policy=policy, critic=critic), stopped), metrics

    def update(
        state: TrainState, experience: Experience, base: PyTree | None = None
    ) -> tuple[TrainState, Metrics]:
        rng, rows = minibatch_rows(state.rng, experience.prompt.shape[0], config)
        carry = (state.replace(rng=rng, step=state.step + 1), jnp.zeros((), bool))
        if rows is None:
            (state, _), metrics = minibatch(carry, experience, base)
        else:
            take = lambda rows: jax.tree.map(lambda x: x[rows], experience)
            step = lambda carry, rows: minibatch(carry, take(rows), base)
            (state, _), metrics = jax.lax.scan(step, carry, rows)
            metrics = {name: Ratio(m.total.sum(), m.count.sum()) for name, m in metrics.items()}
        return move_slow_parts(state, metrics, experience.length.size, config)

    return jax.jit(update, donate_argnums=0)


def step_losses(
    model: ModelConfig,
    config: AlgorithmConfig,
    temperature: float,
    limit: LimitLogits | None,
    old_from_sampler: bool,
) -> tuple[Callable[..., gradients.LossFn], Callable[..., gradients.LossFn]]:
    """((base, kl_coef) → the policy's loss, (base) → the critic's), each of (trained params, batch)."""
    fixed = {"model": model, "config": config, "temperature": temperature, "limit": limit}
    fixed["old_from_sampler"] = old_from_sampler
    policy = lambda base, coef: on_base(functools.partial(policy_step_loss, **fixed, kl_coef=coef), base)
    value = functools.partial(value_step_loss, model=model, clip=config.value_clip)
    return policy, lambda base: on_base(value, lora.value_base(base))


def policy_step(
    policy: Learner,
    grads: PyTree,
    metrics: Metrics,
    step: Array,
    stopped: Array,
    config: AlgorithmConfig,
    optimizer: Optimizer,
) -> tuple[Learner, Array, Metrics]:
    """(policy, stopped, metrics) after a mini-batch: it stays while only the critic warms up, and once the
    KL to the rollout's policy exceeds its limit.

    step []: of this update, counted from 1. stopped [] bool: the limit was met before.
    """
    metrics = dict(metrics)
    if config.kl_stop > 0:
        stopped |= metrics["kl/old"].value > config.kl_stop
        metrics["update/stopped"] = Ratio(stopped.astype(jnp.float32), jnp.ones(()))
    frozen = stopped | (step <= config.critic_warmup)
    policy, step_metrics = gradients.apply(policy, grads, optimizer, frozen=frozen)
    return policy, stopped, metrics | step_metrics


def on_base(loss: gradients.LossFn, base: PyTree | None) -> gradients.LossFn:
    """The loss as a function of what is trained alone: adapters over a base, or all parameters."""
    return lambda trained, batch: loss(lora.join(base, trained), batch)


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
    if config.kl_target > 0:
        coef, metrics = next_kl_coef(state.kl_coef, metrics, samples, config)
        state = state.replace(kl_coef=coef)
    if isinstance(state, AlignState) and state.reference is not None:
        reference = next_reference(state.reference, state.policy.params, state.step, config)
        state = state.replace(reference=reference)
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


def policy_step_loss(
    params: PyTree,
    batch: Experience,
    *,
    model: ModelConfig,
    config: AlgorithmConfig,
    temperature: float,
    kl_coef: Array | None = None,
    limit: LimitLogits | None = None,
    old_from_sampler: bool = False,
) -> tuple[Ratio, Metrics]:
    """`policy_loss` of a mini-batch under `params`, and how far the sampler was from the trainer.

    limit: `Limit.logits` of the `Limit` that the batch was made with, or None. old_from_sampler: as there.
    """

    terms = {"advantage": batch.advantage, "mask": batch.action_mask, "ref_logp": batch.ref_logp}
    terms |= {"is_weight": batch.is_weight, "kl_coef": None}
    if kl_coef is not None:
        terms["kl_coef"] = jnp.full_like(batch.advantage, kl_coef)
    here = config.on_policy and not old_from_sampler
    weight, count = loss_weights(batch.action_mask, config)
    columns = (weight, None if here else batch.old_logp, terms)

    reading = Reading(temperature, limit=limit)

    def score(completion, given, segments):
        at, columns = given
        added = Objective(functools.partial(_weighted_terms, config), columns) if config.by_token else None
        args = (batch.prompt, batch.prompt_length, completion)
        return token_scores(params, model, *args, reading, at, segments, added)

    given = (batch.limit, columns)
    scored = in_packed_rows(score, batch.packing, batch.completion, batch.length, given)
    logp, mask = scored.logp, batch.action_mask
    old_logp = jax.lax.stop_gradient(logp) if here else batch.old_logp
    loss, metrics = policy_loss(logp, old_logp, config=config, entropy=scored.entropy, **terms)
    if config.by_token:  # the same number, with the gradient that came with the scores
        loss = Ratio(scored.total, count)
    if batch.sampler_logp is not None:
        # Sampler and trainer compute the same distribution in different programs: both stay near 0, unless
        # the sampler is one update behind.
        sampler, trainer = batch.sampler_logp, old_logp
        if old_from_sampler:
            trainer = jax.lax.stop_gradient(logp)
        metrics["sampler/gap"] = gradients.mean_columns(jnp.abs(trainer - sampler), mask)
        metrics["kl/sampler"] = gradients.mean_columns(kl_estimate(sampler, trainer, "k3"), mask)
    return loss, metrics


def _weighted_terms(config: AlgorithmConfig, logp: Array, entropy: Array, columns: PyTree) -> Array:
    """What each token adds to the total of `policy_loss`."""
    weight, old_logp, terms = columns
    old_logp = jax.lax.stop_gradient(logp) if old_logp is None else old_logp
    loss, _ = policy_terms(logp, old_logp, config=config, entropy=entropy, **terms)
    return jnp.where(terms["mask"], loss, 0.0) * weight


def value_step_loss(
    params: PyTree, batch: Experience, *, model: ModelConfig, clip: float
) -> tuple[Ratio, Metrics]:
    """`value_loss` of a mini-batch under the critic's `params`, and what explained variance is made of."""

    def score(completion, _, segments):
        return token_values(params, model, batch.prompt, batch.prompt_length, completion, segments)

    value = in_packed_rows(score, batch.packing, batch.completion, batch.length)
    mask = batch.action_mask
    loss, clipped = value_loss(value, batch.old_value, batch.returns, mask, clip)
    mean = lambda x: gradients.mean_columns(x, mask)
    return loss, {
        "loss/value": loss,
        "value/error": mean((value - batch.returns) ** 2),
        "value/return": mean(batch.returns),
        "value/return_square": mean(batch.returns**2),
        "value/clipped": mean(clipped.astype(jnp.float32)),
    }
