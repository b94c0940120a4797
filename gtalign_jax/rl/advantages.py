"""How much better than expected: GAE for a critic, group statistics without one.

Rewards are float32 [P, G] (G samples of each of P prompts); `valid` marks samples whose reward is known:
the others take no part in any statistic and get advantage 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gtalign_jax.types import Array

_EPS = 1e-6


def gae(
    reward: Array, value: Array, mask: Array, gamma: float, lam: float, bootstrap: Array | None = None
) -> tuple[Array, Array]:
    """Generalised advantage estimation (arXiv 1506.02438) over the masked columns of [..., T].

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    t + 1 is the next column where mask is True. bootstrap [...]: the value after the last one (0: the
    episode ended there). Returns (advantage, returns = advantage + value), zero outside the mask.
    """
    after = jnp.zeros(reward.shape[:-1], jnp.float32) if bootstrap is None else bootstrap

    def step(carry, column):
        next_value, next_advantage = carry
        r, v, m = column
        advantage = r + gamma * next_value - v + gamma * lam * next_advantage
        kept = (jnp.where(m, v, next_value), jnp.where(m, advantage, next_advantage))
        return kept, jnp.where(m, advantage, 0.0)

    columns = tuple(jnp.moveaxis(x, -1, 0) for x in (reward.astype(jnp.float32), value, mask))
    _, advantage = jax.lax.scan(step, (after, jnp.zeros_like(after)), columns, reverse=True)
    advantage = jnp.moveaxis(advantage, 0, -1)
    return advantage, jnp.where(mask, advantage + value, 0.0)


def group_advantages(reward: Array, valid: Array, scale: str) -> Array:
    """Group-relative advantages [P, G] float32.

    scale: `std` (r - mean) / std, GRPO; `none` r - mean, Dr. GRPO; `rloo` r - mean of the others;
    `batch` r - group mean, whitened over the batch, REINFORCE++. std is the population's.
    """
    reward = jnp.where(valid, reward.astype(jnp.float32), 0.0)
    count = jnp.sum(valid, axis=-1, keepdims=True)
    mean = jnp.sum(reward, axis=-1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(valid, reward - mean, 0.0)
    if scale == "none":
        return centred
    if scale == "rloo":
        return centred * count / jnp.maximum(count - 1, 1)
    if scale == "std":
        variance = jnp.sum(centred**2, axis=-1, keepdims=True) / jnp.maximum(count, 1)
        return centred / (jnp.sqrt(variance) + _EPS)
    if scale == "batch":
        return whiten(centred, valid)
    raise ValueError(f"unknown scale {scale!r}")


def decoupled_advantages(components: Array, weights: Array, valid: Array) -> Array:
    """GDPO: each reward component [C, P, G] normalised in its group, then summed with weights [C].

    A component with a small range keeps its say next to one with a large range. Whitened over the batch.
    """
    each = jax.vmap(lambda r: group_advantages(r, valid, "std"))(components)
    return whiten(jnp.tensordot(weights, each, 1), valid)


def whiten(x: Array, mask: Array) -> Array:
    """Zero mean and unit standard deviation over the masked entries; zero elsewhere."""
    count = jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.sum(jnp.where(mask, x, 0.0)) / count
    centred = jnp.where(mask, x - mean, 0.0)
    return centred / (jnp.sqrt(jnp.sum(centred**2) / count) + _EPS)


def informative_groups(reward: Array, valid: Array) -> Array:
    """[P] bool: groups whose valid rewards differ; the others teach nothing (DAPO refills them)."""
    low = jnp.min(jnp.where(valid, reward, jnp.inf), axis=-1)
    high = jnp.max(jnp.where(valid, reward, -jnp.inf), axis=-1)
    return high > low
