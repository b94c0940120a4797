"""The analysis that follows from a matrix: its rule, and what it says at the floor."""

import numpy as np

from gtalign_jax.chain.prompt import analysis_text
from gtalign_jax.chain.solver import solver_action, solver_analysis


def test_an_analysis_names_the_cell_that_is_best_for_its_action():
    """At the floor, where all products are zero, too: the cell that dominates is named."""
    detailed = np.array([[2.0, -5.0], [1.0, -3.0], [0.5, -5.0]])
    matrix = np.stack([detailed - [1.0, 0.0], detailed])
    assert solver_analysis(matrix) == analysis_text(detailed, "CQ")
    assert solver_action(matrix) == "CQ"
    swapped = matrix[::-1]
    assert solver_analysis(swapped) == analysis_text(detailed, "CQ")
