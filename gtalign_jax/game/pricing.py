"""Payoff edits that steer a trained policy (paper section 6): pure functions of [..., U, A, 2]."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from gtalign_jax.game.payoff import LLM, USER
from gtalign_jax.types import Array

# Typical length of what each action makes the assistant write (DA, CQ, AQ), in units of a direct answer.
RELATIVE_TOKENS = (1.0, 0.3, 1.3)


def per_token(payoff: Array, price: float, tokens: Sequence[float] = RELATIVE_TOKENS) -> Array:
    """The user pays `price` per unit of text, so long actions lose value for the user."""
    return payoff.at[..., USER].add(-price * jnp.asarray(tokens, payoff.dtype))


def subscription(payoff: Array, cost: float, tokens: Sequence[float] = RELATIVE_TOKENS) -> Array:
    """A flat fee: text costs the provider, so long actions lose value for the LLM."""
    return payoff.at[..., LLM].add(-cost * jnp.asarray(tokens, payoff.dtype))


def custom(payoff: Array, delta: Array) -> Array:
    """Add any [U, A, 2] edit."""
    return payoff + jnp.asarray(delta, payoff.dtype)


def apply_policy(payoff: Array, policy: str, price: float) -> Array:
    """The edit of a named pricing policy: `per_token`, `subscription` or `none`."""
    edits = {"per_token": per_token, "subscription": subscription, "none": lambda p, _: p}
    return edits[policy](jnp.asarray(payoff), price)
