"""Blocks are found in tokens as they are in text, wherever the tokens cut."""

import numpy as np
import pytest

from gtalign_jax.rollout.spans import block_tables, inside_block, token_weights

TEXT = "ab<analyze>cd\nDA</analyze>\n<response>x</response>"


def cut(text, rng):
    """The text as pieces of one to four characters."""
    pieces = []
    while text:
        size = int(rng.integers(1, 5))
        pieces, text = [*pieces, text[:size]], text[size:]
    return pieces


@pytest.mark.parametrize("seed", range(8))
def test_a_block_runs_from_after_its_tag_through_its_closing_tag(seed):
    pieces = cut(TEXT, np.random.default_rng(seed))
    tokens = np.arange(len(pieces), dtype=np.int32)[None, None]
    inside = inside_block(block_tables("analyze", pieces), tokens)[0, 0]
    ends = np.cumsum([len(piece) for piece in pieces])
    opened = np.flatnonzero(ends >= TEXT.index("<analyze>") + len("<analyze>"))[0]
    closed = np.flatnonzero(ends >= TEXT.index("</analyze>") + len("</analyze>"))[0]
    expected = np.zeros(len(pieces), bool)
    expected[opened + 1 : closed + 1] = True
    np.testing.assert_array_equal(inside, expected)


def test_absent_unclosed_and_repeated_blocks():
    texts = ["<analyze>", "a", "</analyze>", "b"]
    tables = block_tables("analyze", texts)
    rows = np.array([[1, 3, 1, 3, 1, 1], [1, 0, 1, 1, 1, 3], [0, 1, 2, 0, 1, 2]], np.int32)
    assert inside_block(tables, rows).tolist() == [
        [False] * 6,
        [False, False, True, True, True, True],
        [False, True, True, False, True, True],
    ]


def test_tokens_weigh_what_their_block_does():
    texts = ["<analyze>", "a", "</analyze>", "<response>", "b", "</response>", "end"]
    blocks = [block_tables(name, texts) for name in ("analyze", "response")]
    found = token_weights(blocks, (0.0, 2.0), [[0, 1, 2, 3, 4, 5, 6], [4, 6]])
    assert [row.tolist() for row in found] == [[1, 0, 0, 1, 2, 2, 1], [1, 1]]
