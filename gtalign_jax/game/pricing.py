"""Payoff edits that steer a trained policy (paper section 6): pure functions of [..., U, A, 2].

A pricing policy is a function (payoff, price, amounts) -> payoff, for NumPy arrays, which stay NumPy in their
own precision, and for JAX arrays. Amounts say what each action makes the assistant write.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gtalign_jax.errors import UserError
from gtalign_jax.game.moves import LLM, USER
from gtalign_jax.game.payoff import choose
from gtalign_jax.types import Array

SCALE = (-5.0, 5.0)  # the payoffs a model writes (paper section 1)
STEP = 0.1  # one decimal, as matrices are written
STEPS = (STEP, 0.2, 0.5, 1.0)  # those that a matrix can be rounded to
# Typical length of what each action makes the assistant write (DA, CQ, AQ), in units of a direct answer.
RELATIVE_TOKENS = (1.0, 0.25, 1.25)
# What an action earns the other side when the published script shifts one side's payoffs (DA, CQ, AQ).
PUBLISHED_LLM_BONUS = (1.0, 0.0, 0.5)
PUBLISHED_USER_BONUS = (0.0, 0.5, 1.0)


class Amounts(NamedTuple):
    """What each action takes [A]: tokens, characters and seconds, in one unit each that a price is for.

    The typical amounts are in units of a direct answer; those of a rollout file in 1 000 tokens, in 1 000
    characters and in seconds.
    """

    tokens: Sequence[float] = RELATIVE_TOKENS
    characters: Sequence[float] = RELATIVE_TOKENS
    seconds: Sequence[float] = RELATIVE_TOKENS


TYPICAL = Amounts()
Policy = Callable[[Array, float, Amounts], Array]


def per_token(payoff: Array, price: float, amounts: Amounts = TYPICAL) -> Array:
    """The user pays `price` per unit of text, so long actions lose value for the user."""
    return payoff - price * _to(USER, amounts.tokens)


def per_character(payoff: Array, price: float, amounts: Amounts = TYPICAL) -> Array:
    """The user pays `price` per unit of characters: no tokenizer decides what a language costs."""
    return payoff - price * _to(USER, amounts.characters)


def latency(payoff: Array, price: float, amounts: Amounts = TYPICAL) -> Array:
    """Time is what the user pays with: each unit of waiting loses the user `price`."""
    return payoff - price * _to(USER, amounts.seconds)


def subscription(payoff: Array, price: float, amounts: Amounts = TYPICAL) -> Array:
    """A flat fee: text costs the provider, so long actions lose value for the LLM."""
    return payoff - price * _to(LLM, amounts.tokens)


def user_credit(payoff: Array, price: float, amounts: Amounts = TYPICAL) -> Array:
    """Pay per token that the provider credits back where the turn ends in a question (CQ, AQ).

    The user pays for a direct answer alone; what the others write, the LLM gives away.
    """
    tokens = np.asarray(amounts.tokens, np.float64)
    answers = np.array([True, False, False])
    return payoff - price * (_to(USER, tokens * answers) + _to(LLM, tokens * ~answers))


def published_llm(payoff: Array, price: float, amounts: Amounts = TYPICAL) -> Array:
    """The published script's edit for the LLM: `price` on each of its payoffs, and a bonus to the user.

    A price of 0 is no edit, as published; what its prices shift does not change a choice, its bonus does.
    """
    del amounts
    return payoff + (price != 0) * (price * _to(LLM, (1, 1, 1)) + _to(USER, PUBLISHED_USER_BONUS))


def published_user(payoff: Array, price: float, amounts: Amounts = TYPICAL) -> Array:
    """The published script's edit for the user: `price` on each of its payoffs, and a bonus to the LLM."""
    del amounts
    return payoff + (price != 0) * (price * _to(USER, (1, 1, 1)) + _to(LLM, PUBLISHED_LLM_BONUS))


def unchanged(payoff: Array, price: float, amounts: Amounts = TYPICAL) -> Array:
    """No edit: the branch that a steered one is compared with."""
    del price, amounts
    return payoff


def linear(payoff: Array, mix: Array, offset: Array) -> Array:
    """Any linear map of each cell: (LLM, user) @ mix [2, 2] + offset, which broadcasts to [U, A, 2].

    For a policy of one's own: a mix of [[1, 0], [a, 1]] has the LLM feel `a` of what the user gets.
    """
    return payoff @ mix + offset


POLICIES: dict[str, Policy] = {
    "per_token": per_token,
    "per_character": per_character,
    "latency": latency,
    "subscription": subscription,
    "user_credit": user_credit,
    "published_llm": published_llm,
    "published_user": published_user,
    "none": unchanged,
}


def apply_policy(payoff: Array, policy: str, price: float, amounts: Amounts = TYPICAL) -> Array:
    """The edit of a named pricing policy. Raises UserError when there is no such policy."""
    if policy not in POLICIES:
        raise UserError(f"pricing policy {policy!r}: use one of {', '.join(POLICIES)}")
    return POLICIES[policy](payoff, price, amounts)


def as_written(payoff: np.ndarray, step: float = STEP) -> np.ndarray:
    """A matrix on the scale and in the steps that models write it in: what they read.

    step: one of STEPS; a model whose payoffs were all halves reads halves, and miscopies what it never saw.
    """
    per_unit = round(1 / step)
    return np.round(np.clip(payoff, *SCALE) * per_unit) / per_unit + 0.0  # no minus zero


def check_step(step: float) -> None:
    """ValueError where a matrix cannot be rounded to a step."""
    if step not in STEPS:
        raise ValueError(f"step={step}: must be one of {', '.join(map(str, STEPS))}")


def billed(payoff: Array, price: float, factor: float = 1.0, amounts: Amounts = TYPICAL) -> Array:
    """What the provider earns [...] when it counts `factor` times the tokens it writes, paid per token.

    The inflated bill is what the matrix is edited by, so that it may drive the choice to a shorter action:
    the gain from misreporting, billed(factor) - billed(1), is not always positive. While the choice holds it
    is (factor - 1) x price x tokens: pay per token rewards over-long text, and nothing in the game says no.
    """
    action = choose(per_token(payoff, price * factor, amounts))
    return price * factor * np.asarray(amounts.tokens)[action]


def _to(player: int, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """[A, 2]: values [A] at one player, 0 at the other."""
    found = np.zeros((len(values), 2))
    found[:, player] = values
    return found
