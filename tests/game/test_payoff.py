"""The matrix's own rules: the paper's tie-break, welfare of a cell, choices."""

import jax
import numpy as np
import pytest

from gtalign_jax.game import moves, pareto, payoff
from gtalign_jax.game.moves import LLM, USER


def matrix(cells: dict[str, tuple[float, float]]) -> np.ndarray:
    """[2, 3, 2] from (user, llm) pairs by key; other cells are (-5, -5)."""
    found = np.full((2, 3, 2), -5.0, np.float32)
    for key, (user, llm) in cells.items():
        found[moves.GTALIGN.cell(key)] = (llm, user)
    return found


def key_of(table) -> str:
    move, action = payoff.welfare_optimal(table)
    return f"{moves.USER_MOVES[int(move)]}_{moves.ACTIONS[int(action)]}"


def test_names_and_places():
    assert moves.GTALIGN.keys == ("DQ_AQ", "DQ_CQ", "DQ_DA", "VQ_AQ", "VQ_CQ", "VQ_DA")
    assert moves.GTALIGN.cell("DQ_AQ") == (1, 2)
    wide = moves.Game(user_moves=("a", "b", "c"), actions=("x", "y"))
    assert len(wide.keys) == 6 and wide.cell("c_y") == (2, 1)
    assert (moves.GTALIGN.shape, wide.shape) == ((2, 3, 2), (3, 2, 2))


def test_a_name_is_split_where_its_game_says():
    wide = moves.Game(user_moves=("ask", "tell"), actions=("wait", "reply"))
    for game in (moves.GTALIGN, wide):
        for move in game.user_moves:
            for action in game.actions:
                assert game.split(f"{move}_{action}") == (move, action)
                assert game.split(action) == (None, action)
    for name in ("AQUA", "XX_AQ", "_AQ", "VQ", "VQ_", "", "ask_wait"):
        with pytest.raises(ValueError, match="no cell or action of a game with DQ_AQ, "):
            moves.GTALIGN.split(name)
    with pytest.raises(ValueError, match="AQ"):
        moves.GTALIGN.cell("AQ")


@pytest.mark.parametrize("batch", [(), (1,), (300,), (4, 5), (0,)])
@pytest.mark.parametrize("game", [moves.GTALIGN, moves.Game(user_moves=("a", "b", "c"), actions=("x", "y"))])
def test_the_frontier_of_numpy_and_jax_arrays_is_that_of_point_sets(batch, game):
    tables = np.random.default_rng(0).integers(-2, 3, (*batch, *game.shape)).astype(np.float64)
    found = payoff.pareto_frontier(tables)
    assert isinstance(found, np.ndarray) and found.shape == tables.shape[:-1] and found.dtype == bool
    expected = [pareto.frontier(table.reshape(-1, 2)) for table in tables.reshape(-1, *game.shape)]
    np.testing.assert_array_equal(found, np.reshape(np.array(expected, bool), found.shape))
    for again in (payoff.pareto_frontier, jax.jit(payoff.pareto_frontier)):
        np.testing.assert_array_equal(again(jax.numpy.asarray(tables)), found)


def test_the_frontier_of_doubles_is_told_in_doubles():
    table = np.zeros((2, 1, 2))
    table[0] += 1e-12
    assert payoff.pareto_frontier(table).tolist() == [[True], [False]]
    assert payoff.pareto_frontier(1 + table).tolist() == [[True], [False]]
    assert np.asarray(payoff.pareto_frontier(jax.numpy.asarray(1 + table))).all()  # float32 sees them equal


@pytest.mark.parametrize(
    ("cells", "winner"),
    [
        ({"VQ_DA": (1, 1), "DQ_AQ": (3, 3), "DQ_DA": (2.9, 3)}, "DQ_AQ"),
        ({"VQ_CQ": (1, 3), "DQ_DA": (3, 1)}, "DQ_DA"),  # equal welfare: larger user payoff
        ({"DQ_CQ": (2, 2), "VQ_AQ": (2, 2)}, "VQ_AQ"),  # equal in all: array order
        ({"VQ_DA": (-4.9, 5), "DQ_DA": (1, 1)}, "DQ_DA"),  # two losses or a split never beat balance
        # 0.3 x 0.3 = 0.1 x 0.9 above the floor, which float32 does not see as equal, either way round.
        ({"VQ_DA": (-4.7, -4.7), "VQ_CQ": (-4.9, -4.1)}, "VQ_DA"),
        ({"VQ_DA": (-4.7, -4.7), "VQ_CQ": (-4.1, -4.9)}, "VQ_CQ"),
        # One decimal more is a true difference.
        ({"VQ_DA": (1.3, 1.0), "VQ_CQ": (0.4, 2.1)}, "VQ_CQ"),
    ],
)
def test_the_tie_break(cells, winner):
    assert key_of(matrix(cells)) == winner


def test_the_optimal_cell_is_that_of_exact_arithmetic_on_games_full_of_ties():
    # Gains above the floor, in tenths, whose products often agree.
    tenths = np.array([1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 15, 18, 20, 24, 30, 36, 40, 45, 60, 72, 90, 100])
    gains = np.random.default_rng(0).choice(tenths, (10_000, 2, 3, 2))
    tables = np.float32((gains - 50) / 10)
    found = [int(u) * 3 + int(a) for u, a in zip(*jax.jit(payoff.welfare_optimal)(tables), strict=True)]
    front = np.asarray(payoff.pareto_frontier(tables)).reshape(-1, 6)
    ties = 0
    for cells, on_front, cell in zip(gains.reshape(-1, 6, 2).tolist(), front, found, strict=True):
        order = lambda i, c=cells: (c[i][LLM] * c[i][USER], c[i][USER], c[i][LLM], -i)
        kept = sorted((i for i in range(6) if on_front[i]), key=order)
        assert cell == kept[-1]
        ties += len(kept) > 1 and order(kept[-1])[0] == order(kept[-2])[0]
    assert ties > 200
    np.testing.assert_array_equal(payoff.choose(tables), np.array(found) % 3)


def test_cell_welfare_counts_gains_above_the_floor():
    table = matrix({"VQ_DA": (-1, 4), "DQ_AQ": (-7, 4)})
    found = payoff.cell_welfare(table)
    assert found[0, 0] == pytest.approx(6.0) and found[1, 2] == 0.0


def test_a_side_may_choose_for_itself():
    table = matrix({"VQ_DA": (1, 4), "DQ_AQ": (4, 1), "VQ_CQ": (3, 3)})
    actions = {rule: moves.ACTIONS[int(payoff.choose(table, rule))] for rule in ("welfare", "llm", "user")}
    assert actions == {"welfare": "CQ", "llm": "DA", "user": "AQ"}
