"""Matrices of the built-in teacher: the action they are drawn for, and their prices."""

import numpy as np
import pytest

from gtalign_jax.chain.solver import solver_action
from gtalign_jax.data import exercises, matrices
from gtalign_jax.game.moves import ACTIONS, LLM, USER
from gtalign_jax.game.payoff import choose
from gtalign_jax.game.pricing import as_written, per_token, subscription


def halves(matrix):
    return np.array_equal(matrix, as_written(matrix, 0.5))


@pytest.mark.parametrize("action", ACTIONS)
def test_a_matrix_recommends_the_action_it_is_drawn_for(action):
    rng = np.random.default_rng(0)
    for shared in (False, True) * 50:
        matrix = matrices.drawn(action, rng, shared)
        assert halves(matrix) and ACTIONS[int(choose(matrix))] == action == solver_action(matrix)
        assert not shared or np.array_equal(matrix[..., LLM], matrix[..., USER])


@pytest.mark.parametrize("beside", [False, True])
def test_a_price_is_taken_off_one_player_and_beside_a_flip_its_neighbour_recommends_another(beside):
    rng, flipped = np.random.default_rng(1), 0
    for _ in range(200):
        matrix = matrices.drawn(str(rng.choice(ACTIONS)), rng, shared=False)
        at = matrices.priced(matrix, rng, beside, 0.5)
        made = [
            (price, policy)
            for policy in (per_token, subscription)
            for price in matrices.PRICES
            if np.array_equal(as_written(policy(matrix, price), 0.5), at)
        ]
        assert made and halves(at)
        near = {
            solver_action(as_written(policy(matrix, price + step), 0.5))
            for price, policy in made
            for step in (-0.1, 0.1)
            if price + step >= 0
        }
        flipped += near != {solver_action(at)}
    assert flipped > 130 if beside else flipped < 90  # a quarter of them flip at no price


def test_the_games_of_an_exercise_end_with_what_their_numbers_say():
    actions = set()
    for line in exercises.write_games(np.random.default_rng(2), 0.5, 200):
        text, _, last = line.strip().partition(": choose ")
        parts = [part.partition(":")[0].replace("=", "").split() for part in text.split(", ")]
        numbers = [[float(x) for x in part[1:]] for part in parts]
        cells = np.array([row[:2] for row in numbers])
        assert last == f"{ACTIONS[int(choose(cells[None]))]}."
        np.testing.assert_allclose(
            [row[2] for row in numbers], np.sqrt(np.prod(cells + 5, axis=1)), atol=5.1e-3
        )
        actions.add(last)
    assert len(actions) == len(ACTIONS)
