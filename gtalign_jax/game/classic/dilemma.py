"""The sequential prisoner's dilemma: one moves, the other sees it and moves; both could have had more.

Payoffs temptation > reward > punishment > sucker. The second mover defects whatever it sees, so the
first defects too: the only subgame-perfect play, though (reward, reward) is better for both.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from gtalign_jax.game.classic.play import Environment
from gtalign_jax.types import Array

COOPERATE, DEFECT = 0, 1
ACTIONS = ("cooperate", "defect")
OBSERVATIONS = ("nothing yet", "saw cooperate", "saw defect")


@dataclasses.dataclass(frozen=True)
class Dilemma:
    """The four payoffs."""

    temptation: float = 5.0
    reward: float = 3.0
    punishment: float = 1.0
    sucker: float = 0.0

    def __post_init__(self) -> None:
        if not self.temptation > self.reward > self.punishment > self.sucker:
            raise ValueError("a dilemma needs temptation > reward > punishment > sucker")

    @property
    def table(self) -> np.ndarray:
        """Payoffs [first's action, second's action, player]."""
        t, r, p, s = self.temptation, self.reward, self.punishment, self.sucker
        return np.array([[[r, r], [s, t]], [[t, s], [p, p]]], np.float32)


def environment(game: Dilemma = Dilemma()) -> Environment:
    """State: (turn, the first's action)."""
    table = jnp.asarray(game.table)

    def start(key: Array) -> tuple[Array, Array]:
        return jnp.int32(0), jnp.int32(0)

    def observe(state: tuple[Array, Array]) -> tuple[Array, Array]:
        turn, seen = state
        return turn, jnp.where(turn == 0, 0, 1 + seen)

    def step(state: tuple[Array, Array], action: Array) -> tuple[tuple[Array, Array], Array, Array]:
        turn, seen = state
        over = turn == 1
        reward = jnp.where(over, table[seen, action], 0.0)
        return (jnp.int32(1), jnp.where(over, seen, action)), reward, over

    return Environment(2, jnp.ones((len(OBSERVATIONS), len(ACTIONS)), bool), start, observe, step)


def subgame_perfect(game: Dilemma = Dilemma()) -> tuple[int, tuple[int, int]]:
    """(the first's action, the second's after each of them), by backward induction."""
    table = game.table
    replies = tuple(int(np.argmax(table[first, :, 1])) for first in (COOPERATE, DEFECT))
    best = int(np.argmax([table[first, reply, 0] for first, reply in enumerate(replies)]))
    return best, (replies[0], replies[1])
