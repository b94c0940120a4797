"""Policy and value losses as sums with their counts, divided only after all parts are added.

All arrays are [..., N] with a bool mask; everything outside the mask counts for nothing.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.lax import stop_gradient

from gtalign_jax.rl.algorithm import AlgorithmConfig
from gtalign_jax.types import Array, Ratio


def kl_estimate(logp: Array, ref_logp: Array, kind: str) -> Array:
    """Per-token estimate of KL(policy || reference) from samples of the policy.

    With d = log p - log ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.
    """
    d = logp - ref_logp
    if kind == "k1":
        return d
    return d**2 / 2 if kind == "k2" else jnp.exp(-d) - 1 + d


def aggregate(x: Array, mask: Array, how: str, max_tokens: int) -> Ratio:
    """Sum of x with the count its mean divides by.

    token: all tokens weigh the same. sequence: every row's token mean weighs the same. constant: row
    sums over max_tokens, so that long rows are not favoured by their length (Dr. GRPO).
    """
    x = jnp.where(mask, x, 0.0)
    tokens = jnp.sum(mask, axis=-1)
    rows = jnp.sum(tokens > 0).astype(jnp.float32)
    if how == "token":
        return Ratio(jnp.sum(x), jnp.sum(tokens).astype(jnp.float32))
    per_row = jnp.sum(x, axis=-1) / (jnp.maximum(tokens, 1) if how == "sequence" else max_tokens)
    return Ratio(jnp.sum(per_row), rows)


def policy_loss(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    config: AlgorithmConfig,
    *,
    ref_logp: Array | None = None,
    entropy: Array | None = None,
    is_weight: Array | None = None,
) -> tuple[Ratio, dict[str, Ratio]]:
    """The policy's loss as one Ratio, and its diagnostics.

    clip:  -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)      r = exp(logp - old_logp)
    cispo: -stop(clip(r)) A logp
    + kl_coef KL(policy || reference) - entropy_coef H
    """
    log_ratio = jnp.where(mask, logp - old_logp, 0.0)
    if config.ratio == "sequence":
        log_ratio = _sequence_log_ratio(log_ratio, mask)
    ratio = jnp.exp(log_ratio)
    bounded = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    if config.loss == "cispo":
        objective = stop_gradient(bounded) * advantage * logp
        clipped = bounded != ratio
    else:
        objective = jnp.minimum(ratio * advantage, bounded * advantage)
        clipped = bounded * advantage < ratio * advantage
        if config.dual_clip > 0:
            floor = config.dual_clip * advantage
            objective = jnp.where(advantage < 0, jnp.maximum(objective, floor), objective)
    loss = -objective if is_weight is None else -objective * is_weight
    mean = lambda x: aggregate(x, mask, "token", logp.shape[-1])
    metrics = {
        "ratio/clipped": mean(clipped.astype(jnp.float32)),
        "ratio/mean": mean(ratio),
        "kl/old": mean(kl_estimate(logp, old_logp, "k3")),
    }
    if ref_logp is not None:
        metrics["kl/ref"] = mean(kl_estimate(logp, ref_logp, "k3"))
        if config.kl_place == "loss" and config.kl_coef:
            loss = loss + config.kl_coef * kl_estimate(logp, ref_logp, config.kl_estimator)
    if entropy is not None:
        metrics["entropy/mean"] = mean(entropy)
        loss = loss - config.entropy_coef * entropy
    total = aggregate(loss, mask, config.aggregation, logp.shape[-1])
    return total, metrics | {"loss/policy": total}


def _sequence_log_ratio(log_ratio: Array, mask: Array) -> Array:
    """GSPO (arXiv 2507.18071): the row's mean log-ratio, with each token's own gradient."""
    mean = jnp.sum(log_ratio, axis=-1, keepdims=True) / jnp.maximum(jnp.sum(mask, -1, keepdims=True), 1)
    return jnp.broadcast_to(mean, log_ratio.shape)


def value_loss(value: Array, old_value: Array, returns: Array, mask: Array, clip: float) -> Ratio:
    """Half the squared error, the worse of the free and the clipped prediction (clip 0: free only)."""
    error = (value - returns) ** 2
    if clip > 0:
        bounded = old_value + jnp.clip(value - old_value, -clip, clip)
        error = jnp.maximum(error, (bounded - returns) ** 2)
    return aggregate(0.5 * error, mask, "token", value.shape[-1])


def truncated_is_weight(trainer_logp: Array, sampler_logp: Array, cap: float) -> Array:
    """min(p_trainer / p_sampler, cap) per token: corrects for a sampler that computes otherwise."""
    return stop_gradient(jnp.minimum(jnp.exp(trainer_logp - sampler_logp), cap))


def soft_overlong_penalty(length: Array, limit: int, margin: int) -> Array:
    """DAPO's length penalty [...]: 0 up to limit - margin, then linear down to -1 at limit."""
    return -jnp.clip((length - (limit - margin)) / margin, 0.0, 1.0)
