"""Payoff matrices as the built-in teacher writes them, and any matrix with a price on it."""

import numpy as np

from gtalign_jax.game.choice import best_cell, best_cells, gains_product
from gtalign_jax.game.moves import ACTIONS
from gtalign_jax.game.pricing import RELATIVE_TOKENS, as_written

MARGIN = 0.1  # a closer call would be noise to a small model
PRICES = np.arange(0.0, 41.0, 0.1)  # up to where a clarifying question, too, has cost all there was to gain
ANY = 90  # of them, those that a price is drawn from which need not be beside a break-even


def drawn(action: str, rng: np.random.Generator, shared: bool) -> np.ndarray:
    """A matrix [2, 3, 2] in steps of one half whose best action is `action`, by a clear margin.

    Detailed questions are better for both than vague ones, so the best cell is in that row. One matrix
    in three is drawn as if a price had been taken off one player, so that edited ones look familiar.
    """
    best = ACTIONS.index(action)
    while True:
        detailed = rng.integers(-3, 6, (3, 2)) / 2
        detailed[best] += rng.integers(1, 5, 2) / 2
        if rng.random() < 1 / 3:
            price = 2.0 * rng.integers(1, 4)
            detailed[:, rng.integers(2)] -= price * np.array(RELATIVE_TOKENS)
        if shared:
            detailed[:, 0] = detailed[:, 1]
        vague = detailed - rng.integers(1, 3, (3, 1)) / 2
        matrix = np.clip(np.stack([vague, detailed]), -5.0, 5.0)
        products = gains_product(matrix[1])
        if int(np.argmax(products)) == best and _margin(products) > MARGIN:
            return matrix


def priced(matrix: np.ndarray, rng: np.random.Generator, beside: bool, step: float) -> np.ndarray:
    """The matrix with the price of text on one player, drawn by chance, rounded to `step`.

    beside: at a price just below or just above one at which the best action flips, if there is one.
    """
    cost = np.zeros((3, 2))
    cost[:, rng.integers(2)] = RELATIVE_TOKENS
    price = PRICES[rng.integers(1, ANY)]
    if beside:
        cells = best_cells(matrix)  # a price is taken off all cells of an action, and none overtakes another
        choice = best_cell(as_written(cells - PRICES[:, None, None] * cost, step))
        flips = np.flatnonzero(choice[1:] != choice[:-1])
        if len(flips):
            price = PRICES[rng.choice(flips) + rng.integers(2)]
    return as_written(matrix - price * cost, step)


def _margin(products: np.ndarray) -> float:
    """By how much the largest product exceeds the second, as a share of it; [A]."""
    second, first = np.sort(products)[-2:]
    return (first - second) / max(second, 1e-6)
