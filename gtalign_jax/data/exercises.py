"""Exercises in weighing: what teaches a small model to follow an edited matrix.

Chains show one matrix and one choice each, which a model made from nothing can guess from the question. Two
kinds of rows take that away: bare games, several analyses without a question, most of them near ties, for a
model that has no sense of numbers yet; and chains with another matrix, at a price, as steering puts it there,
of which the analysis alone is learnt, so that the model's own matrices stay what they were. Another: with its
own, the question would tell what is chosen more often than not.
"""

import numpy as np

from gtalign_jax.chain.prompt import payoff_json
from gtalign_jax.chain.solver import solver_analysis
from gtalign_jax.data import matrices
from gtalign_jax.game.moves import ACTIONS

PROMPT = ({"role": "user", "content": "Weigh these games."},)  # of bare games
GAMES = 6  # of a row
BESIDE = 0.95  # of the prices, those just beside a break-even
FREE = 0.1  # of the bare games, those without a price
SHARED = 0.2  # of the bare games, those in which both players have the same payoffs before the price
ANALYZE, DONE = "<analyze>\n", "</analyze>"


def write_games(rng: np.random.Generator, step: float, count: int = GAMES) -> list[str]:
    """The analyses of so many games, a line each, their payoffs in whole steps."""
    return [f"{_game(rng, step)}\n" for _ in range(count)]


def block(games: list[str]) -> str:
    """The text of a row of bare games."""
    return f"{ANALYZE}{''.join(games)}{DONE}"


def _game(rng: np.random.Generator, step: float) -> str:
    matrix = _any_matrix(rng)
    return solver_analysis(matrix if rng.random() < FREE else _at_a_price(matrix, rng, step))


def _any_matrix(rng: np.random.Generator) -> np.ndarray:
    return matrices.drawn(str(rng.choice(ACTIONS)), rng, shared=rng.random() < SHARED)


def write_priced(chain: str, rng: np.random.Generator, step: float) -> str | None:
    """A chain up to the analysis of another matrix, at a price, that stands in it; None without a matrix."""
    before, found, _ = chain.partition("<payoff>\n")
    if not found:
        return None
    matrix = _at_a_price(_any_matrix(rng), rng, step)
    return f"{before}{found}{payoff_json(matrix)}\n</payoff>\n{ANALYZE}{solver_analysis(matrix)}\n{DONE}"


def _at_a_price(matrix: np.ndarray, rng: np.random.Generator, step: float) -> np.ndarray:
    return matrices.priced(matrix, rng, bool(rng.random() < BESIDE), step)
