"""What a matrix says should be done, by every solution concept of the library, as JSON values."""

import math
from typing import Any

import jax
import numpy as np

from gtalign_jax.game.equilibrium import mixed_nash, price_of_anarchy, pure_nash, stackelberg
from gtalign_jax.game.moves import ACTIONS, GTALIGN, KEYS, LLM, PLAYERS, USER, USER_MOVES
from gtalign_jax.game.payoff import cell_welfare, pareto_frontier, welfare_optimal
from gtalign_jax.types import Array


@jax.jit
def _solve(payoff: Array) -> dict[str, Any]:
    return {
        "chosen": welfare_optimal(payoff),
        "frontier": pareto_frontier(payoff),
        "pure": pure_nash(payoff),
        "mixed": mixed_nash(payoff),
        "stackelberg": stackelberg(payoff),
        "anarchy": price_of_anarchy(payoff),
        "welfare": cell_welfare(payoff),
    }


def solution(payoff: np.ndarray) -> dict[str, Any]:
    """The solutions of a matrix [U, A, 2].

    action and cell: the recommendation (`game.payoff.welfare_optimal`), welfare: its mutual welfare above the
    floor; frontier and nash: cells; mixed: the equilibria that are no cell, each with both strategies and the
    expected payoffs; stackelberg: the cell when the assistant commits; price_of_anarchy: None if infinite.
    """
    found = jax.device_get(_solve(np.asarray(payoff, np.float32)))
    move, action = found["chosen"]
    anarchy = float(found["anarchy"])
    return {
        "action": ACTIONS[action],
        "cell": _key(move, action),
        "welfare": float(found["welfare"][move, action]),
        "frontier": _cells(found["frontier"]),
        "nash": _cells(found["pure"]),
        "mixed": _mixtures(found["mixed"]),
        "stackelberg": _key(*found["stackelberg"]),
        "price_of_anarchy": anarchy if math.isfinite(anarchy) else None,
    }


def _key(move: int, action: int) -> str:
    return f"{USER_MOVES[move]}_{ACTIONS[action]}"


def _cells(mask: np.ndarray) -> list[str]:
    return [key for key in KEYS if mask[GTALIGN.cell(key)]]


def _mixtures(found: Any) -> list[dict[str, Any]]:
    names = {"user": (USER_MOVES, found.user), "llm": (ACTIONS, found.llm)}
    slots = [i for i in np.flatnonzero(found.mask) if found.user[i].max() + found.llm[i].max() < 2]
    return [
        {side: dict(zip(moves, x[i].tolist(), strict=True)) for side, (moves, x) in names.items()}
        | {"value": {PLAYERS[p]: float(found.value[i, p]) for p in (LLM, USER)}}
        for i in slots
    ]
