"""The host's recommendation among cells beside the library's, and by hand."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gtalign_jax.game.choice import best_cell, gains_product
from gtalign_jax.game.payoff import cell_welfare, welfare_optimal

TENTHS = arrays.arrays(np.int64, (20, 3, 2), elements=st.integers(-50, 50))
FEW = arrays.arrays(np.int64, (20, 3, 2), elements=st.sampled_from((-50, -45, 0, 5)))  # many ties


@given(st.one_of(TENTHS, FEW))
def test_the_best_cell_is_the_librarys(tenths):
    cells = tenths / 10
    of_library = welfare_optimal(cells.astype(np.float32)[:, None])[1]
    np.testing.assert_array_equal(best_cell(cells), of_library)
    np.testing.assert_allclose(np.sqrt(gains_product(cells)), cell_welfare(cells), atol=1e-5)


def test_ties_go_to_the_user_then_to_the_llm_then_to_the_first():
    assert best_cell(np.array([[1.0, 1.0], [4.0, -1.0], [-1.0, 4.0]])) == 2  # 36 each
    assert best_cell(np.array([[-5.0, -5.0], [1.0, -5.0], [0.0, -5.0]])) == 1  # nothing to gain together
    assert best_cell(np.array([[0.0, 0.0], [2.0, 2.0], [2.0, 2.0]])) == 1
    assert gains_product(np.array([0.1, 0.2])) == 26.52
