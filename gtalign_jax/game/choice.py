"""The recommendation among a few cells on the host: NumPy alone, for those who write texts and not arrays."""

import numpy as np

from gtalign_jax.game.moves import LLM, USER

FLOOR = -5.0


def gains_product(cells: np.ndarray) -> np.ndarray:
    """The product [...] of both gains above the floor of cells [..., 2]: the square of their welfare."""
    gains = np.maximum(np.asarray(cells, np.float64) - FLOOR, 0.0)
    return np.round(gains[..., LLM] * gains[..., USER], 9)  # as equal as the decimals that are written


def best_cells(payoff: np.ndarray) -> np.ndarray:
    """What each action may earn [A, 2]: its best cell of a matrix [U, A, 2]."""
    by_action = np.swapaxes(np.asarray(payoff, np.float64), 0, 1)
    return by_action[np.arange(len(by_action)), best_cell(by_action)]


def best_cell(cells: np.ndarray) -> np.ndarray:
    """The index [...] of the best of cells [..., N, 2], in the order of `game.payoff.welfare_optimal`: larger
    welfare, then larger user payoff, then larger LLM payoff, then the first."""
    # Backwards, because the sort below leaves equal ones in their order, and the last of all is taken.
    backwards = np.asarray(cells, np.float64)[..., ::-1, :]
    keys = (backwards[..., LLM], backwards[..., USER], gains_product(backwards))
    return backwards.shape[-2] - 1 - np.lexsort(keys, axis=-1)[..., -1]
