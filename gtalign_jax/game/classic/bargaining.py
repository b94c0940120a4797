"""Rubinstein bargaining (1982): two share a pie; in turns one offers, the other takes it or offers next.

A round's delay shrinks the pie to each by its discount. With no last round the first proposer keeps
(1 - d_2) / (1 - d_1 d_2), which is 1 / (1 + d) for equal patience, and the offer is taken at once.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from gtalign_jax.game.classic.play import Environment
from gtalign_jax.types import Array

REJECT, ACCEPT = 0, 1


@dataclasses.dataclass(frozen=True)
class Bargaining:
    """discounts: of the first proposer and of the other. rounds: offers until both have nothing. parts: the
    pie is offered in whole parts of 1 / parts."""

    discounts: tuple[float, float] = (0.8, 0.8)
    rounds: int = 4
    parts: int = 10

    def __post_init__(self) -> None:
        if not all(0 <= d < 1 for d in self.discounts):
            raise ValueError(f"discounts={self.discounts}: must lie in [0, 1)")
        if self.rounds < 1 or self.parts < 1:
            raise ValueError("rounds and parts must be at least 1")


def rubinstein(discounts: tuple[float, float]) -> float:
    """What the first proposer keeps without a last round."""
    first, second = discounts
    return (1.0 - second) / (1.0 - first * second)


def shares(game: Bargaining) -> np.ndarray:
    """What the proposer of each round [rounds] keeps in subgame-perfect play, of a pie that divides freely.

    In the last round all of it; before, all but what the other would get by waiting a round:
    x_r = 1 - d x_{r+1}, d the discount of who answers in r.
    """
    kept = np.ones(game.rounds)
    for r in range(game.rounds - 2, -1, -1):
        kept[r] = 1.0 - game.discounts[(r + 1) % 2] * kept[r + 1]
    return kept


def shares_in_parts(game: Bargaining) -> np.ndarray:
    """`shares` of a pie in parts: the least offer is made that the other takes, who takes a tie."""
    kept = np.ones(game.rounds)
    for r in range(game.rounds - 2, -1, -1):
        least = game.discounts[(r + 1) % 2] * kept[r + 1]
        kept[r] = 1.0 - np.ceil(least * game.parts - 1e-9) / game.parts
    return kept


def environment(game: Bargaining = Bargaining()) -> Environment:
    """State: (turn, the parts that are offered). Two turns a round: an offer, and its answer.

    Observations: the round, to who proposes; round and offer, to who answers. Actions: the parts offered; to
    answer, REJECT or ACCEPT.
    """
    offers = game.parts + 1
    actions = max(offers, 2)
    legal = np.zeros((game.rounds * (1 + offers), actions), bool)
    legal[: game.rounds, :offers] = True
    legal[game.rounds :, [REJECT, ACCEPT]] = True
    discounts = jnp.asarray(game.discounts)

    def start(key: Array) -> tuple[Array, Array]:
        return jnp.int32(0), jnp.int32(0)

    def observe(state: tuple[Array, Array]) -> tuple[Array, Array]:
        turn, offer = state
        r, answers = turn // 2, turn % 2
        seen = jnp.where(answers == 1, game.rounds + r * offers + offer, r)
        return (r + answers) % 2, seen

    def step(state: tuple[Array, Array], action: Array) -> tuple[tuple[Array, Array], Array, Array]:
        turn, offer = state
        r, answers = turn // 2, turn % 2 == 1
        agreed = answers & (action == ACCEPT)
        share = offer / game.parts
        split = jnp.where(r % 2 == 0, jnp.array([1.0 - share, share]), jnp.array([share, 1.0 - share]))
        reward = jnp.where(agreed, split * discounts**r, 0.0)
        return (turn + 1, jnp.where(answers, 0, action)), reward, agreed

    return Environment(2 * game.rounds, jnp.asarray(legal), start, observe, step)
