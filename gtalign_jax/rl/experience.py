"""From a scored rollout to what the update sees: advantages, old and reference log-probabilities."""

from __future__ import annotations

import jax.numpy as jnp

from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.heads import token_values
from gtalign_jax.rl.advantages import gae, group_advantages, whiten
from gtalign_jax.rl.algorithm import AlgorithmConfig
from gtalign_jax.rl.logprobs import token_logprobs
from gtalign_jax.rl.losses import kl_estimate, truncated_is_weight
from gtalign_jax.types import Array, Experience, PyTree, Rollout


def make_experience(
    rollout: Rollout,
    reward: Array,
    valid: Array,
    params: PyTree,
    reference: PyTree | None,
    critic: PyTree | None,
    model: ModelConfig,
    config: AlgorithmConfig,
    temperature: float,
) -> Experience:
    """Experience of a rollout with reward [P, G] float32 and valid [P, G] bool.

    Old logprobs are the trainer's own, at the sampling temperature; on-policy they are left to the
    update, whose forward pass computes the same numbers. A row without a verdict, or cut short when
    `drop_truncated` is set, keeps its place with an empty mask.
    """
    if config.drop_truncated:
        valid = valid & rollout.finished
    mask = rollout.action_mask & valid[..., None]
    args = (model, rollout.prompt, rollout.prompt_length, rollout.completion)
    old_logp = rollout.sampler_logp
    if not config.on_policy or config.is_cap > 0 or config.kl_place == "reward":
        old_logp, _ = token_logprobs(params, *args, temperature=temperature)
    ref_logp = None
    if config.needs_reference and reference is not None:
        ref_logp, _ = token_logprobs(reference, *args, temperature=temperature)
    token_reward = _on_last_token(reward.astype(jnp.float32), mask)
    if ref_logp is not None and config.kl_place == "reward":
        token_reward -= config.kl_coef * kl_estimate(old_logp, ref_logp, config.kl_estimator) * mask
    returns = old_value = None
    if config.advantage == "gae":
        old_value = token_values(critic, *args)
        advantage, returns = gae(token_reward, old_value, mask, config.gamma, config.lam)
        advantage = whiten(advantage, mask)
    else:
        total = jnp.sum(token_reward, axis=-1)
        advantage = group_advantages(total, valid, config.scale)[..., None] * mask
    return Experience(
        prompt=rollout.prompt,
        prompt_length=rollout.prompt_length,
        completion=rollout.completion,
        length=rollout.length,
        action_mask=mask,
        old_logp=old_logp,
        advantage=advantage,
        ref_logp=ref_logp,
        returns=returns,
        old_value=old_value,
        is_weight=truncated_is_weight(old_logp, rollout.sampler_logp, config.is_cap)
        if config.is_cap > 0
        else None,
    )


def _on_last_token(reward: Array, mask: Array) -> Array:
    """[P, G, N] float32: the reward at each row's last action, zero elsewhere."""
    index = jnp.arange(mask.shape[-1])
    last = jnp.max(jnp.where(mask, index, -1), axis=-1, keepdims=True)
    return jnp.where(index == last, reward[..., None], 0.0)
