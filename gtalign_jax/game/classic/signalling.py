"""Spence's signalling (1973): a worker of one of two kinds may buy a signal; an employer sees it and pays.

The employer's best wage is what it believes the worker is worth. A worker of kind k with wage w gets
w - cost_k [signal bought]; the employer -(w - worth)^2. The signal costs the able worker less.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gtalign_jax.game.classic.play import Environment
from gtalign_jax.types import Array

LOW, HIGH = 0, 1
PLAIN, SIGNAL = 0, 1


@dataclasses.dataclass(frozen=True)
class Signalling:
    """worth, cost: of the LOW and the HIGH kind. able: the chance of HIGH. wages: how many can be paid."""

    worth: tuple[float, float] = (1.0, 2.0)
    cost: tuple[float, float] = (1.2, 0.4)
    able: float = 0.5
    wages: int = 5

    def __post_init__(self) -> None:
        if not self.worth[LOW] < self.worth[HIGH]:
            raise ValueError("the HIGH kind must be worth more")
        if not 0 <= self.cost[HIGH] < self.cost[LOW]:
            raise ValueError("the signal must cost the HIGH kind less")
        if not 0 < self.able < 1:
            raise ValueError(f"able={self.able}: must lie between 0 and 1")
        if self.wages < 2:
            raise ValueError("wages: at least the two worths")

    @property
    def mean(self) -> float:
        """What a worker is worth of whom nothing is known."""
        return (1 - self.able) * self.worth[LOW] + self.able * self.worth[HIGH]


def separates(game: Signalling) -> bool:
    """Whether HIGH alone buys the signal in some equilibrium: it is worth its price to that kind and not to
    the other, cost_H <= worth_H - worth_L <= cost_L."""
    gain = game.worth[HIGH] - game.worth[LOW]
    return game.cost[HIGH] <= gain <= game.cost[LOW]


def pools_plain(game: Signalling) -> bool:
    """Whether there is one in which nobody buys it. Always: who would, is believed to be LOW."""
    return game.mean >= game.worth[LOW] - game.cost[HIGH]


def pools_on_signal(game: Signalling) -> bool:
    """Whether there is one in which all buy it, and who does not is believed to be LOW: it must be worth its
    price to LOW too, mean - cost_L >= worth_L."""
    return game.mean - game.cost[LOW] >= game.worth[LOW]


def survives_intuition(game: Signalling) -> bool:
    """Whether pooling without the signal passes the intuitive criterion (Cho and Kreps 1987): no kind alone
    would gain from the signal if it were believed."""
    gains = [game.worth[HIGH] - cost > game.mean for cost in game.cost]
    return gains[HIGH] == gains[LOW]


def environment(game: Signalling = Signalling()) -> Environment:
    """State: (turn, the worker's kind, what it bought). The worker observes its kind, the employer the signal
    (2 + it). Actions: PLAIN or SIGNAL; a wage, from the lower worth to the higher."""
    wages = jnp.linspace(*game.worth, game.wages)
    legal = np.zeros((4, game.wages), bool)
    legal[:2, [PLAIN, SIGNAL]] = True
    legal[2:] = True
    worth, cost = jnp.asarray(game.worth), jnp.asarray(game.cost)

    def start(key: Array) -> tuple[Array, Array, Array]:
        kind = jax.random.bernoulli(key, game.able).astype(jnp.int32)
        return jnp.int32(0), kind, jnp.int32(0)

    def observe(state: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        turn, kind, bought = state
        return turn, jnp.where(turn == 0, kind, 2 + bought)

    def step(
        state: tuple[Array, Array, Array], action: Array
    ) -> tuple[tuple[Array, Array, Array], Array, Array]:
        turn, kind, bought = state
        over = turn == 1
        wage = wages[action]
        paid = jnp.array([wage - cost[kind] * bought, -((wage - worth[kind]) ** 2)])
        return (jnp.int32(1), kind, jnp.where(over, bought, action)), jnp.where(over, paid, 0.0), over

    return Environment(2, jnp.asarray(legal), start, observe, step)
