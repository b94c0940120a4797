"""Payoff edits that steer a trained policy (paper section 6): pure functions of [..., U, A, 2]."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from gtalign_jax.errors import UserError
from gtalign_jax.game.moves import LLM, USER
from gtalign_jax.types import Array

# Typical length of what each action makes the assistant write (DA, CQ, AQ), in units of a direct answer.
RELATIVE_TOKENS = (1.0, 0.25, 1.25)


def per_token(payoff: Array, price: float, tokens: Sequence[float] = RELATIVE_TOKENS) -> Array:
    """The user pays `price` per unit of text, so long actions lose value for the user."""
    return payoff.at[..., USER].add(-price * jnp.asarray(tokens, payoff.dtype))


def subscription(payoff: Array, cost: float, tokens: Sequence[float] = RELATIVE_TOKENS) -> Array:
    """A flat fee: text costs the provider, so long actions lose value for the LLM."""
    return payoff.at[..., LLM].add(-cost * jnp.asarray(tokens, payoff.dtype))


def custom(payoff: Array, delta: Array) -> Array:
    """Add any [U, A, 2] edit."""
    return payoff + jnp.asarray(delta, payoff.dtype)


def unchanged(payoff: Array, price: float) -> Array:
    """No edit: the branch that a steered one is compared with."""
    del price
    return payoff


POLICIES: dict[str, Callable[[Array, float], Array]] = {
    "per_token": per_token,
    "subscription": subscription,
    "none": unchanged,
}


def apply_policy(payoff: Array, policy: str, price: float) -> Array:
    """The edit of a named pricing policy. Raises UserError when there is no such policy."""
    if policy not in POLICIES:
        raise UserError(f"pricing policy {policy!r}: use one of {', '.join(POLICIES)}")
    return POLICIES[policy](jnp.asarray(payoff), price)
