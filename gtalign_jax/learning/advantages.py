"""How much better than expected: GAE for a critic, group statistics without one.

Rewards are float32 [P, G] (G samples of each of P prompts); `valid` marks samples whose reward is known:
the others take no part in any statistic and get advantage 0, whatever number (NaN too) stands there.

Standard deviations are those of a sample (ddof 1), as in TRL, verl and Tunix. A group whose known rewards
are all equal gets exactly 0: rounding in its mean would otherwise be blown up by the division.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gtalign_jax.types import Array


def gae(
    reward: Array, value: Array, mask: Array, gamma: float, lam: float, bootstrap: Array | None = None
) -> tuple[Array, Array]:
    """Generalised advantage estimation (arXiv 1506.02438) over the masked columns of [..., T].

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    t + 1 is the next column where mask is True. bootstrap [...]: the value after the last one (0: the
    episode ended there). Returns (advantage, returns = advantage + value), zero outside the mask.
    """
    reward, value = _floating(reward), _floating(value)
    after = jnp.zeros(reward.shape[:-1], value.dtype) if bootstrap is None else _floating(bootstrap)

    def step(carry: tuple[Array, Array], column: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        next_value, next_advantage = carry
        r, v, m = column
        advantage = r + gamma * next_value - v + gamma * lam * next_advantage
        kept = (jnp.where(m, v, next_value), jnp.where(m, advantage, next_advantage))
        return kept, jnp.where(m, advantage, 0.0)

    columns = tuple(jnp.moveaxis(x, -1, 0) for x in (reward, value, mask))
    _, advantage = jax.lax.scan(step, (after, jnp.zeros_like(after)), columns, reverse=True)
    advantage = jnp.moveaxis(advantage, 0, -1)
    return advantage, jnp.where(mask, advantage + value, 0.0)


def discounted_returns(reward: Array, mask: Array, gamma: float) -> Array:
    """R_t = r_t + gamma R_{t+1} over the masked columns of [..., T]; zero outside the mask."""
    return gae(reward, jnp.zeros_like(_floating(reward)), mask, gamma, 1.0)[1]


def group_advantages(reward: Array, valid: Array, scale: str, *, ddof: int = 1, eps: float = 1e-4) -> Array:
    """Group-relative advantages [P, G] float32, by the name of a scale in `SCALES`.

    std:   (r - mean) / (std + eps)               GRPO (arXiv 2402.03300)
    none:  r - mean                               Dr. GRPO (arXiv 2503.20783)
    rloo:  r - mean of the other samples          RLOO (arXiv 2402.14740)
    batch: r - mean, then whitened over all valid samples    REINFORCE++-baseline (arXiv 2501.03262)

    ddof, eps: of the standard deviation. Raises ValueError on another name.
    """
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}")
    reward = jnp.where(valid, _floating(reward), 0.0)
    count = jnp.sum(valid, axis=-1, keepdims=True)
    mean = jnp.sum(reward, axis=-1, keepdims=True) / jnp.maximum(count, 1)
    differs = informative_groups(reward, valid)[..., None]
    centred = jnp.where(valid & differs, reward - mean, 0.0)
    return SCALES[scale](centred, valid, ddof, eps)


def _over_std(centred: Array, valid: Array, ddof: int, eps: float) -> Array:
    count = jnp.sum(valid, axis=-1, keepdims=True)
    variance = jnp.sum(centred**2, axis=-1, keepdims=True) / jnp.maximum(count - ddof, 1)
    return centred / (jnp.sqrt(variance) + eps)


def _leave_one_out(centred: Array, valid: Array, ddof: int, eps: float) -> Array:
    # r - (n mean - r) / (n - 1) = (r - mean) n / (n - 1)
    count = jnp.sum(valid, axis=-1, keepdims=True)
    return centred * count / jnp.maximum(count - 1, 1)


# From rewards centred in their group to advantages: (centred, valid, ddof, eps) -> [P, G].
SCALES: dict[str, Callable[[Array, Array, int, float], Array]] = {
    "std": _over_std,
    "none": lambda centred, valid, ddof, eps: centred,
    "rloo": _leave_one_out,
    "batch": lambda centred, valid, ddof, eps: whiten(centred, valid, ddof=ddof),
}


def decoupled_advantages(
    components: Array, weights: Array, valid: Array, *, ddof: int = 1, eps: float = 1e-4
) -> Array:
    """GDPO (arXiv 2601.05242): components [C, P, G], each normalised in its group, summed with weights [C].

    A component with a small range keeps its say next to one with a large range. The sum is whitened over
    the batch, so that its scale does not grow with the number of components.
    """

    def normalise(component: Array) -> Array:
        return group_advantages(component, valid, "std", ddof=ddof, eps=eps)

    return whiten(jnp.tensordot(weights, jax.vmap(normalise)(components), 1), valid, ddof=ddof)


def whiten(x: Array, mask: Array, *, ddof: int = 1, eps: float = 1e-8) -> Array:
    """(x - mean) / sqrt(variance + eps) over the masked entries; zero elsewhere, and for a single entry."""
    count = jnp.sum(mask)
    mean = jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(count, 1)
    centred = jnp.where(mask, x - mean, 0.0)
    return centred * jax.lax.rsqrt(jnp.sum(centred**2) / jnp.maximum(count - ddof, 1) + eps)


def informative_groups(reward: Array, valid: Array) -> Array:
    """[P] bool: groups whose valid rewards differ; the others teach nothing (DAPO refills them)."""
    low = jnp.min(jnp.where(valid, reward, jnp.inf), axis=-1)
    high = jnp.max(jnp.where(valid, reward, -jnp.inf), axis=-1)
    return high > low


def _floating(x: Array) -> Array:
    """At least float32, so that no reward is ever held in an integer buffer."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
