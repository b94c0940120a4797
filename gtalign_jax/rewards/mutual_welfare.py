"""The mutual-welfare reward (paper section 3): pure functions of `Features`, jitted and swappable.

band(n; lo, hi) = sigmoid(k (n - lo)) sigmoid(k (hi - n))
U = eps + w_answer Q_u + w_band band(response words) + w_brevity exp(-reasoning chars / scale)
L = eps + w_format F + w_payoff M + w_answer Q_l + w_band band(total words) [+ w_frontier P]
W = U^alpha L^(1 - alpha), or another welfare function of `game.welfare`

Every symbol, its unit and source: docs/rewards.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import sigmoid

from gtalign_jax.config import check_call, load_symbol
from gtalign_jax.errors import INF, UserError, in_range, positive, within
from gtalign_jax.game import welfare
from gtalign_jax.types import Array, Features, Reward


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Every number of the formulas above; the defaults are the paper's.

    *_words: (lo, hi) of a band, in words. band_k: its steepness per word. brevity_chars: the scale of
    the brevity term, in characters. alpha: weight of the user in Cobb-Douglas and CES; linear_user
    likewise. rho: the CES exponent. disagreement: (U, L) without agreement, for Nash bargaining.
    """

    eps: float = 1e-4
    band_k: float = 0.005
    brevity_chars: float = 500.0
    user_answer: float = 0.5
    user_band: float = 0.2
    user_brevity: float = 0.3
    response_words: tuple[float, float] = (20.0, 500.0)
    llm_format: float = 0.2
    llm_payoff: float = 0.2
    llm_answer: float = 0.4
    llm_band: float = 0.2
    llm_frontier: float = 0.0
    total_words: tuple[float, float] = (500.0, 1000.0)
    alpha: float = 0.5
    linear_user: float = 0.5
    rho: float = -1.0
    disagreement: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        shares = ("user_answer", "user_band", "user_brevity", "llm_format", "llm_payoff", "llm_answer")
        within(self, 0, INF, *("eps", "band_k", *shares, "llm_band", "llm_frontier", "disagreement"))
        positive(self, "brevity_chars")
        in_range(self, alpha=(0, 1), linear_user=(0, 1), response_words=(0, INF), total_words=(0, INF))
        if math.isnan(self.rho) or self.rho == INF:  # -inf is the smaller of the two
            raise ValueError(f"rho={self.rho}: must be a number below infinity")
        for name in ("response_words", "total_words", "disagreement"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name}={getattr(self, name)}: give two numbers")
        for name in ("response_words", "total_words"):
            if getattr(self, name)[0] > getattr(self, name)[1]:
                raise ValueError(f"{name}={getattr(self, name)}: the smaller number comes first")

    def with_frontier(self) -> RewardConfig:
        """The evaluation variant: part of the LLM's answer and band weight goes to consistency P."""
        return dataclasses.replace(self, llm_answer=0.35, llm_band=0.05, llm_frontier=0.2)


ROUNDING = 2e-6  # a few float32 steps

RewardFn = Callable[[Features, RewardConfig], Reward]
"""A reward: features [B] and the numbers of the config in, `Reward` [B] out. Pure, jit- and vmap-able."""


def band(count: Array, bounds: tuple[float, float], k: float) -> Array:
    """How far a word count [B] lies inside (lo, hi): a product of two sigmoids, in (0, 1)."""
    low, high = bounds
    return sigmoid(k * (count - low)) * sigmoid(k * (high - count))


def payoff_score(payoff: Array) -> Array:
    """M in [0, 1] of matrices [B, U, A, 2]: the share of cells whose two payoffs truly differ.

    Identical payoffs collapse the incentive structure: a cell earns half for any difference and half
    for a relative difference above 0.1. A difference of exactly a tenth (1.0 and 0.9) does not count,
    whichever way its binary fractions round.
    """
    cells = payoff.reshape(*payoff.shape[:-3], -1, 2)
    count = cells.shape[-2]
    # Cell by cell: XLA on CPUs does not vectorise a reduction over such a short inner axis.
    return sum(_cell_score(cells[..., i, 0], cells[..., i, 1]) for i in range(count)) / count


def _cell_score(llm: Array, user: Array) -> Array:
    gap = jnp.abs(user - llm)
    scale = jnp.maximum(jnp.maximum(jnp.abs(user), jnp.abs(llm)), 1e-8)
    return 0.5 * (gap > 0) + 0.5 * (gap > (0.1 + ROUNDING) * scale)


def welfare_parts(features: Features, c: RewardConfig) -> tuple[Array, Array, dict[str, Array]]:
    """(U, L, named terms), all [B] float32, zero where no reward is due."""
    f = features
    due = f.payoff_ok.astype(jnp.float32)
    parts = {
        "format": f.format_ok.astype(jnp.float32),
        "payoff": payoff_score(f.payoff),
        "frontier": f.frontier,
        "user_band": band(f.response_words, c.response_words, c.band_k),
        "llm_band": band(f.total_words, c.total_words, c.band_k),
        "brevity": jnp.exp(-f.reasoning_chars / c.brevity_chars),
        "answer_user": f.answer_user,
        "answer_llm": f.answer_llm,
    }
    user = (
        c.eps
        + c.user_answer * f.answer_user
        + c.user_band * parts["user_band"]
        + c.user_brevity * parts["brevity"]
    )
    llm = (
        c.eps
        + c.llm_format * parts["format"]
        + c.llm_payoff * parts["payoff"]
        + c.llm_answer * f.answer_llm
        + c.llm_band * parts["llm_band"]
        + c.llm_frontier * f.frontier
    )
    return user * due, llm * due, {name: value * due for name, value in parts.items()}


def component_weights(config: RewardConfig) -> dict[str, float]:
    """The weight in U or L of each of `Reward.parts`, for decoupled normalisation (GDPO): each part is
    normalised in its group, then the parts are summed with these weights (`learning.advantages`)."""
    return {
        "format": config.llm_format,
        "payoff": config.llm_payoff,
        "frontier": config.llm_frontier,
        "user_band": config.user_band,
        "llm_band": config.llm_band,
        "brevity": config.user_brevity,
        "answer_user": config.user_answer,
        "answer_llm": config.llm_answer,
    }


def _reward(aggregate: Callable[[Array, Array, RewardConfig], Array]) -> RewardFn:
    """A reward function from a welfare function of (U, L)."""

    def reward(features: Features, config: RewardConfig) -> Reward:
        user, llm, parts = welfare_parts(features, config)
        return Reward(user=user, llm=llm, welfare=aggregate(user, llm, config), parts=parts)

    return reward


mutual_welfare = _reward(lambda u, v, c: welfare.cobb_douglas(u, v, c.alpha))


def _with_frontier(features: Features, config: RewardConfig) -> Reward:
    """The evaluation variant; it also needs an <analyze> block (paper section 3)."""
    if features.analyze_ok is not None:
        features = features.replace(payoff_ok=features.payoff_ok & features.analyze_ok)
    return mutual_welfare(features, config.with_frontier())


REWARDS: dict[str, RewardFn] = {
    "cobb_douglas": mutual_welfare,
    "cobb_douglas_frontier": _with_frontier,
    "linear": _reward(lambda u, v, c: welfare.linear(u, v, c.linear_user)),
    "user": _reward(lambda u, v, c: welfare.user_only(u, v)),
    "llm": _reward(lambda u, v, c: welfare.llm_only(u, v)),
    "rawlsian": _reward(lambda u, v, c: welfare.rawlsian(u, v)),
    "ces": _reward(lambda u, v, c: welfare.ces(u, v, c.rho, c.alpha)),
    "nash_bargaining": _reward(lambda u, v, c: welfare.nash_bargaining(u, v, c.disagreement)),
}


def resolve_reward(name: str, where: str = "config.reward.fn") -> RewardFn:
    """A registered reward, or `module:function`; UserError lists the names. where: what named it."""
    if name in REWARDS:
        return REWARDS[name]
    if ":" not in name:
        raise UserError(f"{where}={name!r}: use one of {', '.join(REWARDS)}, or module:function")
    reward = load_symbol(name, where)
    of_config = functools.partial(jax.eval_shape, lambda features: reward(features, RewardConfig()))
    found = check_call(f"{where}={name!r}", functools.partial(of_config, _shapes(2)))
    if not isinstance(found, Reward):
        raise UserError(f"{where}={name!r}: returned {type(found).__name__}; it must return a Reward")
    return reward


def _shapes(rows: int) -> Features:
    """Features [rows] as shapes alone."""
    number, flag = (jax.ShapeDtypeStruct((rows,), kind) for kind in (jnp.float32, bool))
    return Features(
        valid=flag,
        format_ok=flag,
        answer_user=number,
        answer_llm=number,
        payoff=jax.ShapeDtypeStruct((rows, 2, 3, 2), jnp.float32),
        payoff_ok=flag,
        frontier=number,
        reasoning_chars=number,
        response_words=number,
        total_words=number,
        source=jax.ShapeDtypeStruct((rows,), jnp.int32),
        analyze_ok=flag,
    )
