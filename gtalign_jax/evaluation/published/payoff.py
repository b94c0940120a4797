"""The published edits and choices on a payoff matrix: a dict of six keys, each `{"LLM": x, "user": y}`.

Host floats; NaN and infinite payoffs are taken as numbers, as published.
"""

from collections.abc import Callable, Mapping

from gtalign_jax.game.moves import ACTIONS
from gtalign_jax.game.pricing import PUBLISHED_LLM_BONUS, PUBLISHED_USER_BONUS

Cell = Mapping[str, float]
Matrix = Mapping[str, Cell]

LLM_BONUS = dict(zip(ACTIONS, PUBLISHED_LLM_BONUS, strict=True))
USER_BONUS = dict(zip(ACTIONS, PUBLISHED_USER_BONUS, strict=True))
TOLERANCE = 1e-9


def action_of(key: str) -> str:
    """The assistant's action in a key such as `DQ_AQ`."""
    return key.rpartition("_")[2]


def _unbeaten(payoff: Matrix, beats: Callable[[Cell, Cell], bool]) -> list[str]:
    """Keys, in the matrix's order, of the cells that no other cell beats."""
    return [key for key, mine in payoff.items() if not any(beats(other, mine) for other in payoff.values())]


def frontier(payoff: Matrix) -> list[str]:
    """Keys of the Pareto frontier in the matrix's order, all comparisons with a tolerance of 1e-9.

    A NaN compares as false, so its cell neither dominates nor is dominated.
    """

    def dominates(other: Cell, mine: Cell) -> bool:
        pairs = [(other[player], mine[player]) for player in ("LLM", "user")]
        no_worse = all(theirs >= own - TOLERANCE for theirs, own in pairs)
        return no_worse and any(theirs > own + TOLERANCE for theirs, own in pairs)

    return _unbeaten(payoff, dominates)


def product_optimal_keys(payoff: Matrix) -> list[str]:
    """Keys with the largest product of both payoffs (published as Pareto-optimal).

    Two negative payoffs beat two small positive ones; a NaN product is never beaten.
    """
    return _unbeaten(payoff, lambda other, mine: other["LLM"] * other["user"] > mine["LLM"] * mine["user"])


def product_optimal_actions(payoff: Matrix) -> list[str]:
    """The actions of `product_optimal_keys`, each once, in order of appearance."""
    return list(dict.fromkeys(action_of(key) for key in product_optimal_keys(payoff)))


def transform(payoff: Matrix, scale_llm: float = 0.0, scale_user: float = 0.0) -> dict[str, dict[str, float]]:
    """The published edit, each payoff rounded to one decimal (Python's `round`).

    A nonzero `scale_llm` is added to every LLM payoff, the user gets USER_BONUS and `scale_user` is
    ignored; else a nonzero `scale_user` is added to every user payoff and the LLM gets LLM_BONUS.
    """
    edited = {}
    for key, cell in payoff.items():
        llm, user = float(cell["LLM"]), float(cell["user"])
        if scale_llm:
            llm, user = llm + scale_llm, user + USER_BONUS[action_of(key)]
        elif scale_user:
            llm, user = llm + LLM_BONUS[action_of(key)], user + scale_user
        edited[key] = {"LLM": round(llm, 1), "user": round(user, 1)}
    return edited
