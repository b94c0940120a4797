"""Packed rows: every chain once an epoch, in order, whole; batches are functions of their number."""

import itertools

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtalign_jax.data.loader import Demonstration
from gtalign_jax.data.packing import PackedStream
from gtalign_jax.errors import UserError

SLOTS = 16
TOKENS = st.lists(st.integers(1, 99), min_size=1, max_size=SLOTS // 2)
DATA = st.lists(
    st.builds(Demonstration, prompt=TOKENS, completions=st.lists(TOKENS, min_size=1, max_size=3)),
    min_size=1,
    max_size=8,
)


def chains_of(batch):
    """The chains of a batch row by row: (prompt, completion)."""
    for tokens, segments, positions, learn in zip(
        batch.tokens, batch.segments, batch.positions, batch.learn, strict=True
    ):
        filled = int((segments > 0).sum())
        assert (segments[:filled] > 0).all() and not tokens[filled:].any() and not learn[filled:].any()
        assert (np.diff(segments[:filled]) >= 0).all()
        for number in range(1, segments.max() + 1):
            (place,) = np.nonzero(segments == number)
            assert positions[place].tolist() == list(range(len(place)))
            yield tokens[place][~learn[place]].tolist(), tokens[place][learn[place]].tolist()


@settings(max_examples=15)
@given(DATA, st.integers(1, 3), st.integers(0, 3))
def test_the_stream_is_every_chain_whole_in_the_order_of_the_epochs(data, rows, seed):
    """Within a row as in the stream; together the batches are the stream, cut where a chain found no room."""
    chains = [(d.prompt, c) for d in data for c in d.completions]
    order = grain.MapDataset.range(len(chains)).seed(seed).shuffle().repeat()
    stream = (chains[order[i]] for i in itertools.count())
    packed = PackedStream(data, rows, SLOTS, seed)
    for k in range(4):
        batch = packed.batch(k)
        assert batch.tokens.shape == (rows, SLOTS) and batch.tokens.dtype == np.int32
        expected = [[] for _ in range(rows)]
        for prompt, completion in itertools.islice(stream, batch.chains):
            size = len(prompt) + len(completion)
            room = (r for r in expected if sum(len(p) + len(c) for p, c in r) + size <= SLOTS)
            next(room).append((prompt, completion))
        assert list(chains_of(batch)) == [chain for row in expected for chain in row]
    again = PackedStream(data, rows, SLOTS, seed)
    for k in (2, 2, 1):
        np.testing.assert_array_equal(again.batch(k).tokens, packed.batch(k).tokens)


def test_a_row_that_is_too_short_is_refused():
    data = [Demonstration([1, 2, 3], [[4], [5, 6]])]
    with pytest.raises(UserError, match="config.sft.pack=4: a chain has 5 tokens; raise it to that"):
        PackedStream(data, 1, 4, 0)
