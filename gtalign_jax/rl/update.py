"""One update of the policy (and critic) from one rollout's experience.

for each epoch, for each mini-batch of prompts:
    logp, entropy  = token_logprobs(policy, mini-batch)         prompt computed once per group
    gradient       = of policy_loss, summed over micro-batches, divided once
    policy         = AdamW step, skipped when the gradient is not finite
    critic         = the same with value_loss, when there is one
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.heads import token_values
from gtalign_jax.rl import gradients
from gtalign_jax.rl.algorithm import AlgorithmConfig
from gtalign_jax.rl.logprobs import token_logprobs
from gtalign_jax.rl.losses import policy_loss, value_loss
from gtalign_jax.types import Array, Experience, PyTree, Ratio, TrainState

Metrics = dict[str, Ratio]


def make_update(
    model: ModelConfig,
    config: AlgorithmConfig,
    optimizer: optax.GradientTransformation,
    critic_optimizer: optax.GradientTransformation | None,
    temperature: float,
) -> Callable[[TrainState, Experience], tuple[TrainState, Metrics]]:
    """The jitted update of one algorithm; the state is donated."""
    policy_fn = functools.partial(policy_step_loss, model=model, config=config, temperature=temperature)
    value_fn = functools.partial(value_step_loss, model=model, clip=config.value_clip)

    def step(state: TrainState, rows: Array, experience: Experience) -> tuple[TrainState, Metrics]:
        batch = jax.tree.map(lambda x: x[rows], experience)
        grads, metrics = gradients.accumulate(policy_fn, state.policy.params, batch, config.microbatches)
        policy, step_metrics = gradients.apply(state.policy, grads, optimizer)
        critic = state.critic
        if critic is not None:
            grads, value_metrics = gradients.accumulate(value_fn, critic.params, batch, config.microbatches)
            critic, _ = gradients.apply(critic, grads, critic_optimizer)
            metrics |= value_metrics
        return state.replace(policy=policy, critic=critic), metrics | step_metrics

    def update(state: TrainState, experience: Experience) -> tuple[TrainState, Metrics]:
        rng, key = jax.random.split(state.rng)
        state = state.replace(rng=rng, step=state.step + 1)
        rows = minibatch_rows(key, experience.prompt.shape[0], config)
        if rows.shape[0] == 1:
            return step(state, rows[0], experience)
        state, metrics = jax.lax.scan(lambda s, r: step(s, r, experience), state, rows)
        return state, {name: Ratio(m.total.sum(), m.count.sum()) for name, m in metrics.items()}

    return jax.jit(update, donate_argnums=0)


def minibatch_rows(key: Array, prompts: int, config: AlgorithmConfig) -> Array:
    """Prompt numbers [epochs * minibatches, prompts / minibatches], newly shuffled each epoch."""
    if config.on_policy:
        return jnp.arange(prompts)[None]
    keys = jax.random.split(key, config.epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, prompts))(keys)
    return order.reshape(config.epochs * config.minibatches, -1)


def policy_step_loss(
    params: PyTree, batch: Experience, *, model: ModelConfig, config: AlgorithmConfig, temperature: float
) -> tuple[Ratio, Metrics]:
    """`policy_loss` of a mini-batch under `params`."""
    logp, entropy = token_logprobs(
        params, model, batch.prompt, batch.prompt_length, batch.completion, temperature=temperature
    )
    old_logp = jax.lax.stop_gradient(logp) if config.on_policy else batch.old_logp
    loss, metrics = policy_loss(
        logp,
        old_logp,
        batch.advantage,
        batch.action_mask,
        config,
        ref_logp=batch.ref_logp,
        entropy=entropy,
        is_weight=batch.is_weight,
    )
    # Sampler and trainer compute the same distribution in different programs: this should stay near 0.
    gap = gradients.mean_columns(jnp.abs(logp - batch.old_logp), batch.action_mask)
    return loss, metrics | ({"sampler/gap": gap} if config.on_policy and not config.is_cap else {})


def value_step_loss(
    params: PyTree, batch: Experience, *, model: ModelConfig, clip: float
) -> tuple[Ratio, Metrics]:
    """`value_loss` of a mini-batch under the critic's `params`."""
    value = token_values(params, model, batch.prompt, batch.prompt_length, batch.completion)
    mask = batch.action_mask
    loss = value_loss(value, batch.old_value, batch.returns, mask, clip)
    return loss, {
        "loss/value": loss,
        "value/error": gradients.mean_columns((value - batch.returns) ** 2, mask),
        "value/return": gradients.mean_columns(batch.returns, mask),
        "value/return_square": gradients.mean_columns(batch.returns**2, mask),
    }
