"""The analysis that follows from a matrix: its rule, and what it says at the floor."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gtalign_jax.chain.prompt import analysis_text
from gtalign_jax.chain.solver import solver_action, solver_analysis
from gtalign_jax.game.moves import ACTIONS
from gtalign_jax.game.payoff import choose


def test_an_analysis_names_the_cell_that_is_best_for_its_action():
    """At the floor, where all products are zero, too: the cell that dominates is named."""
    detailed = np.array([[2.0, -5.0], [1.0, -3.0], [0.5, -5.0]])
    matrix = np.stack([detailed - [1.0, 0.0], detailed])
    assert solver_analysis(matrix) == analysis_text(detailed, "CQ")
    assert solver_action(matrix) == "CQ"
    swapped = matrix[::-1]
    assert solver_analysis(swapped) == analysis_text(detailed, "CQ")


@given(
    arrays.arrays(np.int64, (2, 3, 2), elements=st.one_of(st.integers(-50, 50), st.sampled_from((-50, 0, 5))))
)
def test_the_solver_is_the_librarys(tenths):
    assert solver_action(tenths / 10) == ACTIONS[int(choose((tenths / 10).astype(np.float32)))]
