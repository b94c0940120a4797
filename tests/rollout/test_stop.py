"""A stop string is found at the token that completes it, however the text is cut into tokens."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from gtalign_jax.rollout.stop import stop_table

TOKENS = ["", "<", "</", "/", "pay", "p", "a", "yoff", "y", "o", "f", ">", ">\n", "off><", "</payoff", " "]


def _first_stop(table: np.ndarray, tokens: list[int]) -> int | None:
    state = 0
    for i, token in enumerate(tokens):
        state = table[state, token]
        if state == len(table) - 1:
            return i
    return None


@pytest.mark.parametrize("stops", [("</payoff>",), ("</payoff>", "off"), ("aa", "><<")])
@hypothesis.given(tokens=st.lists(st.integers(0, len(TOKENS) - 1), max_size=30))
def test_it_agrees_with_searching_the_text(stops, tokens):
    texts = [TOKENS[t] for t in tokens]
    prefixes = ["".join(texts[: i + 1]) for i in range(len(texts))]
    expected = next((i for i, text in enumerate(prefixes) if any(s in text for s in stops)), None)
    assert _first_stop(stop_table(stops, TOKENS), tokens) == expected


def test_a_tag_cut_into_every_pair_of_pieces_is_found():
    tag = "</payoff>"
    for cut in range(1, len(tag)):
        pieces = [tag[:cut], tag[cut:] + " and more"]
        assert _first_stop(stop_table([tag], pieces), [0, 1]) == 1


def test_after_a_stop_the_search_begins_anew():
    table = stop_table(["ab"], ["a", "b", ""])
    state = table[table[0, 0], 1]
    assert state == len(table) - 1
    assert table[state, 2] == 0 and table[table[state, 0], 1] == state


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        stop_table([""], ["a"])
