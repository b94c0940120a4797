"""What <analyze> says when it follows from the matrix: the solver's choice, and the text that names it."""

import jax
import numpy as np

from gtalign_jax.chain.prompt import analysis_text
from gtalign_jax.game.moves import ACTIONS
from gtalign_jax.game.payoff import welfare_optimal
from gtalign_jax.types import Array


@jax.jit
def _solve(payoff: Array) -> tuple[Array, Array]:
    """(the user move of each action's best cell [A], the recommended action), both by `welfare_optimal`."""
    alone = payoff.swapaxes(0, 1)[:, :, None]  # each action as if there were no other
    return welfare_optimal(alone)[0], welfare_optimal(payoff)[1]


def solver_action(payoff: np.ndarray) -> str:
    """The action that a matrix [U, A, 2] recommends (`game.payoff.welfare_optimal`)."""
    return ACTIONS[int(_solve(np.asarray(payoff, np.float32))[1])]


def solver_analysis(payoff: np.ndarray) -> str:
    """The text of <analyze> that follows from a matrix: each action's best cell, then the recommendation."""
    best, action = jax.device_get(_solve(np.asarray(payoff, np.float32)))
    return analysis_text(payoff[best, np.arange(payoff.shape[1])], ACTIONS[action])
