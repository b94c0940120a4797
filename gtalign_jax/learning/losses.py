"""Policy and value losses as sums with their counts, divided only after all parts are added.

All arrays are [..., N] with a bool mask; everything outside the mask counts for nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.lax import stop_gradient

from gtalign_jax.config import load_symbol
from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.types import Array, Ratio

# exp of a larger log-ratio is cut here: one broken token must not turn the whole step into inf.
_MAX_LOG = 20.0


def kl_estimate(logp: Array, ref_logp: Array, kind: str) -> Array:
    """Per-token estimate of KL(policy || reference) from samples of the policy.

    With d = log p - log ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. As estimates, k1 and k3 are
    unbiased. As a loss on samples of the policy, the expected gradient of k2 is that of
    KL(policy || reference), that of k3 is that of KL(reference || policy), and that of k1 is zero.
    """
    d = logp - ref_logp
    if kind == "k1":
        return d
    return d**2 / 2 if kind == "k2" else jnp.exp(jnp.minimum(-d, _MAX_LOG)) - 1 + d


def adapt_kl_coef(coef: Array, kl: Array, target: float, horizon: float, samples: int) -> Array:
    """The next KL coefficient (arXiv 1909.08593): raised when kl is over its target, lowered when under.

    coef (1 + clip(kl / target - 1, -0.2, 0.2) samples / horizon)
    """
    return coef * (1 + jnp.clip(kl / target - 1, -0.2, 0.2) * samples / horizon)


def aggregate(x: Array, mask: Array, how: str, max_tokens: int) -> Ratio:
    """Sum of x with the count its mean divides by.

    token: all tokens weigh the same. sequence: every row's token mean weighs the same. constant: row
    sums over max_tokens, so that long rows are not favoured by their length (Dr. GRPO).
    """
    return _weighted(x, mask, *token_weights(mask, how, max_tokens))


def _weighted(x: Array, mask: Array, weight: Array, count: Array) -> Ratio:
    return Ratio(jnp.sum(jnp.where(mask, x, 0.0) * weight), count)


def token_weights(mask: Array, how: str, max_tokens: int) -> tuple[Array, Array]:
    """(what each token weighs in `aggregate` [..., N], 0 outside the mask; the count [])."""
    tokens = jnp.sum(mask, axis=-1, keepdims=True)
    weight = mask.astype(jnp.float32)
    if how == "token":
        return weight, jnp.sum(weight)
    weight /= jnp.maximum(tokens, 1) if how == "sequence" else max_tokens
    return weight, jnp.sum(tokens > 0).astype(jnp.float32)


class Columns(NamedTuple):
    """What a token's part of the loss reads besides its log-probabilities, all [..., N].

    mask bool. ref_logp: of the reference. is_weight multiplies the first term only. kl_coef: in place of
    the config's.
    """

    advantage: Array
    mask: Array
    ref_logp: Array | None = None
    is_weight: Array | None = None
    kl_coef: Array | None = None


def policy_loss(
    logp: Array, old_logp: Array, columns: Columns, config: AlgorithmConfig, entropy: Array | None = None
) -> tuple[Ratio, dict[str, Ratio]]:
    """The policy's loss as one Ratio, and its diagnostics; arguments as of `policy_terms`.

    Its terms, aggregated. Constant aggregation divides by config.max_tokens, or N when that is 0.
    """
    loss, found = policy_terms(logp, old_logp, columns, config, entropy)
    metrics = {name: aggregate(x, columns.mask, "token", 0) for name, x in found.items()}
    total = _weighted(loss, columns.mask, *loss_weights(columns.mask, config))
    return total, metrics | {"loss/policy": total}


def loss_weights(mask: Array, config: AlgorithmConfig) -> tuple[Array, Array]:
    """`token_weights` of the config's aggregation for mask [..., N]."""
    return token_weights(mask, config.aggregation, config.max_tokens or mask.shape[-1])


def policy_terms(
    logp: Array, old_logp: Array, columns: Columns, config: AlgorithmConfig, entropy: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """(what each token adds to the policy's loss, its diagnostics); arrays are [..., N].

    clip:  -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)      r = exp(logp - old_logp)
           and, with dual_clip c, not above -c A where A < 0 (arXiv 1912.09729)
    cispo: -stop(clip(r)) A logp                                  (arXiv 2506.13585)
    + kl_coef KL(policy || reference) - entropy_coef H
    """
    objective, metrics = _objective(logp, old_logp, columns.advantage, columns.mask, config)
    loss = -objective if columns.is_weight is None else -objective * columns.is_weight
    metrics["kl/old"] = kl_estimate(logp, old_logp, "k3")
    if columns.ref_logp is not None:
        metrics["kl/ref"] = kl_estimate(logp, columns.ref_logp, "k3")
        if config.kl_place == "loss" and config.kl_coef:
            coef = config.kl_coef if columns.kl_coef is None else columns.kl_coef
            loss = loss + coef * kl_estimate(logp, columns.ref_logp, config.kl_estimator)
    if entropy is not None:
        metrics["entropy/mean"] = entropy
        loss = loss - config.entropy_coef * entropy
    return loss, metrics


def _objective(
    logp: Array, old_logp: Array, advantage: Array, mask: Array, config: AlgorithmConfig
) -> tuple[Array, dict[str, Array]]:
    """(what each token adds to the objective, how its ratio was clipped), all [..., N]."""
    log_ratio = jnp.where(mask, logp - old_logp, 0.0)
    if config.ratio == "sequence":
        log_ratio = sequence_log_ratio(log_ratio, mask)
    ratio = jnp.exp(jnp.minimum(log_ratio, _MAX_LOG))
    bounded = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    low, high = bounded > ratio, bounded < ratio
    dual = jnp.zeros_like(low)
    if config.loss == "cispo":
        objective = stop_gradient(bounded) * advantage * logp
    elif config.loss == "clip":
        objective = jnp.minimum(ratio * advantage, bounded * advantage)
        low, high = low & (advantage < 0), high & (advantage > 0)  # elsewhere the minimum is r A
        if config.dual_clip > 0:
            dual = (advantage < 0) & (ratio > config.dual_clip)
            objective = jnp.where(dual, config.dual_clip * advantage, objective)
    else:
        objective = load_symbol(config.loss, "config.algorithm.loss")(ratio, bounded, advantage, logp)
    share = {"clipped": low | high | dual, "clip_low": low, "clip_high": high, "clip_dual": dual}
    metrics = {f"ratio/{name}": x.astype(jnp.float32) for name, x in share.items()}
    return objective, metrics | {"ratio/mean": ratio}


def sequence_log_ratio(log_ratio: Array, mask: Array) -> Array:
    """GSPO (arXiv 2507.18071): log s = the row's mean log-ratio, in every column [..., N].

    In column t its gradient is that of logp_t alone (the paper's GSPO-token form). Where the advantage
    is one number a row, the sum over t is the gradient of s itself.
    """
    length = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(mask, log_ratio, 0.0), axis=-1, keepdims=True) / length
    return stop_gradient(mean - log_ratio) + log_ratio


def value_loss(
    value: Array, old_value: Array, returns: Array, mask: Array, clip: float
) -> tuple[Ratio, Array]:
    """(half the squared error, where the clipped prediction decides it [..., N] bool).

    The error is the worse of the free prediction's and the one kept within `clip` of the old value
    (clip 0: the free one's).
    """
    error = (value - returns) ** 2
    clipped = jnp.zeros(error.shape, bool)
    if clip > 0:
        moved = value - old_value
        bounded = (old_value + jnp.clip(moved, -clip, clip) - returns) ** 2
        clipped = (jnp.abs(moved) > clip) & (bounded > error)
        error = jnp.where(clipped, bounded, error)
    return aggregate(0.5 * error, mask, "token", 0), clipped


def truncated_is_weight(trainer_logp: Array, sampler_logp: Array, cap: float) -> Array:
    """min(p_trainer / p_sampler, cap) per token: corrects for a sampler that computes otherwise."""
    log_ratio = jnp.minimum(trainer_logp - sampler_logp, _MAX_LOG)
    return stop_gradient(jnp.minimum(jnp.exp(log_ratio), cap))


def soft_overlong_penalty(length: Array, limit: int, margin: float) -> Array:
    """DAPO's length penalty [...]: 0 up to limit - margin, then linear down to -1 at limit."""
    return -jnp.clip((length - (limit - margin)) / margin, 0.0, 1.0)
