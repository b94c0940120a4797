"""What <analyze> says when it follows from the matrix: the solver's choice, and the text that names it."""

import numpy as np

from gtalign_jax.chain.prompt import analysis_text
from gtalign_jax.game.choice import best_cell, best_cells
from gtalign_jax.game.moves import ACTIONS


def solver_action(payoff: np.ndarray) -> str:
    """The action that a matrix [U, A, 2] of payoffs as they are written recommends
    (`game.payoff.welfare_optimal`)."""
    cells = payoff.reshape(-1, payoff.shape[-1])
    return ACTIONS[int(best_cell(cells)) % payoff.shape[1]]


def solver_analysis(payoff: np.ndarray) -> str:
    """The text of <analyze> that follows from a matrix: each action's best cell, then the recommendation."""
    return analysis_text(best_cells(payoff), solver_action(payoff))
