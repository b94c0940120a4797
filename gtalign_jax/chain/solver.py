"""What <analyze> says when it follows from the matrix: the solver's choice, and the text that names it."""

import jax
import numpy as np

from gtalign_jax.chain.prompt import analysis_text
from gtalign_jax.game.moves import ACTIONS
from gtalign_jax.game.payoff import cell_welfare, welfare_optimal
from gtalign_jax.types import Array


@jax.jit
def _solve(payoff: Array) -> tuple[Array, Array]:
    """(welfare of each cell [U, A], the recommended action)."""
    return cell_welfare(payoff), welfare_optimal(payoff)[1]


def solver_action(payoff: np.ndarray) -> str:
    """The action that a matrix [U, A, 2] recommends (`game.payoff.welfare_optimal`)."""
    return ACTIONS[int(_solve(np.asarray(payoff, np.float32))[1])]


def solver_analysis(payoff: np.ndarray) -> str:
    """The text of <analyze> that follows from a matrix: each action's best cell, then the recommendation."""
    welfare, action = jax.device_get(_solve(np.asarray(payoff, np.float32)))
    best = np.argmax(welfare, axis=0)
    return analysis_text(payoff[best, np.arange(payoff.shape[1])], ACTIONS[action])
