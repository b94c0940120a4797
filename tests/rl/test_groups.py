"""Dynamic sampling: which groups fill a batch, and the joining of batches of different width."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from gtalign_jax.rl import groups
from gtalign_jax.types import PromptBatch


@hypothesis.given(st.lists(st.booleans(), min_size=1, max_size=20), st.data())
def test_select(flags, data):
    """Distinct rows in order; an uninformative one only when no informative one is left out."""
    count = data.draw(st.integers(1, len(flags)))
    rows, found = groups.select(np.array(flags), count)
    chosen = [flags[r] for r in rows]
    assert len(set(rows.tolist())) == count and sorted(rows) == rows.tolist()
    assert found == sum(chosen) == min(count, sum(flags))
    assert rows[np.array(chosen, bool)].tolist() == [i for i, f in enumerate(flags) if f][:found]


def test_select_needs_enough_groups():
    with pytest.raises(ValueError, match="2 groups cannot fill a batch of 3"):
        groups.select(np.ones(2, bool), 3)


def test_join_pads_to_the_widest_and_take_picks_rows():
    narrow = PromptBatch(np.ones((2, 3), np.int32), np.array([3, 2]), np.array([0, 1]))
    wide = PromptBatch(np.full((1, 5), 7, np.int32), np.array([5]), np.array([9]))
    both = groups.join([narrow, wide])
    assert both.tokens.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [7] * 5]
    assert both.tokens.dtype == np.int32
    last = groups.take(both, np.array([0, 2]))
    assert last.id.tolist() == [0, 9] and last.length.tolist() == [3, 5] and last.tokens.shape == (2, 5)
