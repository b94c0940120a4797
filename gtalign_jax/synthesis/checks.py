"""A component as it stands in a chain, or why it cannot: what a teacher wrote, read and held to its form."""

import re
from collections.abc import Mapping

import numpy as np

from gtalign_jax.chain.parse import BLOCKS, chosen_action, parse_payoff, plain_chain, to_array
from gtalign_jax.chain.prompt import format_chain, payoff_json
from gtalign_jax.chain.solver import solver_action
from gtalign_jax.game.pricing import SCALE
from gtalign_jax.rewards.judges.verdict import after_reasoning
from gtalign_jax.synthesis.ask import ANALYSIS, COMPONENTS, MATRIX

_BLOCK = dict(zip(COMPONENTS, BLOCKS, strict=True))
_TAG = re.compile(rf"</?(?:{'|'.join(BLOCKS)})>")
_OBJECT = re.compile(r"\{.*\}", re.DOTALL)


class Unfit(Exception):
    """Why a text is no component: a kind to count by, perhaps with details in brackets."""


def read_component(component: str, text: str, written: Mapping[str, str]) -> str:
    """The text of a component as its chain holds it; Unfit where it is none.

    A model may think before, put it between its block's tags, and a matrix in a fence with words around it.
    written: the earlier components, which an analysis must not contradict.
    """
    inside = re.findall(rf"<{_BLOCK[component]}>(.*?)</{_BLOCK[component]}>", text, re.DOTALL)
    found = (inside[-1] if inside else after_reasoning(text)[0]).strip()
    if component == MATRIX:
        return payoff_json(_matrix(found))
    if tag := _TAG.search(found):
        raise Unfit(f"holds a tag ({tag.group()})")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise Unfit("holds half a surrogate pair") from error
    if component == ANALYSIS:
        _check_choice(found, written[MATRIX])
    if plain_chain(found).response is None:
        raise Unfit("says nothing")
    return found


def chain_of(written: Mapping[str, str]) -> str:
    """The chain of four components."""
    return format_chain(*(written[component] for component in COMPONENTS))


def matrix_of(written: Mapping[str, str]) -> np.ndarray:
    """The matrix [U, A, 2] of a candidate that has one."""
    payoff, _ = parse_payoff(written[MATRIX])
    assert payoff is not None  # it was read before
    return to_array(payoff)


def _matrix(text: str) -> np.ndarray:
    found = _OBJECT.search(text)
    payoff, errors = parse_payoff(found.group() if found else text)
    if payoff is None:
        raise Unfit(f"cannot be read ({errors[0]})")
    matrix = to_array(payoff)
    low, high = SCALE
    if matrix.min() < low or matrix.max() > high:
        raise Unfit(f"goes beyond {low:g} to {high:g} ({matrix.min():g} to {matrix.max():g})")
    return matrix


def _check_choice(analyze: str, matrix: str) -> None:
    chosen, right = chosen_action(analyze), solver_action(matrix_of({MATRIX: matrix}))
    if chosen is None:
        raise Unfit("chooses nothing")
    if chosen != right:
        raise Unfit(f"contradicts its matrix ({chosen}, which says {right})")
