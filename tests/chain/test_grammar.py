"""The automaton accepts the canonical chains, all of them and nothing else."""

import itertools
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from gtalign_jax.chain.grammar import accepts, chain_grammar, run
from gtalign_jax.chain.parse import BLOCKS, parse_chain, payoff_array
from gtalign_jax.chain.prompt import format_chain, payoff_json

GRAMMAR = chain_grammar()
TAGS = [f"<{slash}{name}>" for name in BLOCKS for slash in ("", "/")]
_CHARACTER = r"(?!</?(?:thinking|payoff|analyze|response)>)"
# The first pages of Unicode that hold white space are no content: U+0080-00BF, 1680-16BF and so on.
_SAID = r"[^\x00-\x20\x7f-\xbf\u1680-\u16bf\u2000-\u207f\u3000-\u303f\ufec0-\ufeff]"
_FREE = rf"(?:{_CHARACTER}.)*?{_CHARACTER}{_SAID}(?:{_CHARACTER}.)*"
_NUMBER = r"(?!-0\.0)-?(?:[0-4]\.[0-9]|5\.0)"
_CELLS = ", ".join(
    rf'"{key}": \{{"LLM": {_NUMBER}, "user": {_NUMBER}\}}'
    for key in ("DQ_AQ", "DQ_CQ", "DQ_DA", "VQ_AQ", "VQ_CQ", "VQ_DA")
)
# The language written a second time, for an engine that is not ours.
CHAIN = re.compile(
    rf"<thinking>{_FREE}</thinking>\n<payoff>\n\{{{_CELLS}\}}\n</payoff>\n"
    rf"<analyze>{_FREE}</analyze>\n<response>{_FREE}</response>",
    re.DOTALL,
)

pieces = st.one_of(
    st.sampled_from([*TAGS, "<", "</", "<thinkin", "</respons", ">", "\n", "<b>", "é", "日本", "😀", "\x00"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
tagged = st.lists(pieces, max_size=6).map("".join)
plain = tagged.filter(lambda text: re.fullmatch(_FREE, text, re.DOTALL))
matrices = st.lists(st.integers(-50, 50), min_size=12, max_size=12).map(
    lambda tenths: np.array(tenths, np.float64).reshape(2, 3, 2) / 10
)


@hypothesis.given(plain, matrices, plain, plain)
def test_every_canonical_chain_is_accepted_and_keeps_its_matrix(thinking, matrix, analyze, response):
    text = format_chain(thinking, matrix, analyze, response)
    assert accepts(GRAMMAR, text)
    chain = parse_chain(text)
    assert chain.format_ok and chain.reward_ok
    np.testing.assert_array_equal(payoff_array(chain)[0], matrix)


@hypothesis.settings(max_examples=300)
@hypothesis.given(tagged, matrices, tagged, tagged, st.data())
def test_edited_chains_are_judged_as_by_a_regular_expression(thinking, matrix, analyze, response, data):
    text = format_chain(thinking, matrix, analyze, response)
    at = data.draw(st.integers(0, len(text)))
    text = text[:at] + data.draw(pieces) + text[at + data.draw(st.integers(0, 2)) :]
    accepted = accepts(GRAMMAR, text)
    assert accepted == bool(CHAIN.fullmatch(text))
    if accepted:
        chain = parse_chain(text)
        assert chain.format_ok and chain.reward_ok


def test_a_payoff_is_one_of_the_hundred_and_one_canonical_numbers():
    at = run(GRAMMAR, b'<thinking>.</thinking>\n<payoff>\n{"DQ_AQ": {"LLM": ')
    texts = ("".join(c) for n in range(1, 6) for c in itertools.product("-.0123456789", repeat=n))
    found = {text for text in texts if run(GRAMMAR, text.encode() + b",", at) != GRAMMAR.dead}
    assert found == {f"{tenths / 10:.1f}" for tenths in range(-50, 51)}


def test_every_live_state_is_reached_and_can_end():
    step, dead = GRAMMAR.step, GRAMMAR.dead
    reached, ending = {GRAMMAR.start}, {GRAMMAR.accept}
    for _ in range(len(step)):
        reached |= set(step[list(reached)].ravel().tolist())
        ending |= set(np.flatnonzero(np.isin(step, list(ending)).any(axis=1)).tolist())
    assert reached == set(range(len(step))) and ending == reached - {dead}
    assert (step[[GRAMMAR.accept, dead]] == dead).all()


def test_walks_at_random_write_utf8_and_well_formed_chains():
    """Bytes are drawn evenly among the allowed ones; after a while the shortest way is taken."""
    rng = np.random.default_rng(0)
    away = np.full(len(GRAMMAR.step), 10_000)
    away[GRAMMAR.accept] = 0
    for _ in range(1000):
        away = np.minimum(away, 1 + away[GRAMMAR.step].min(axis=1))
    for stay in rng.integers(0, 600, 60):
        text, state = b"", GRAMMAR.start
        while state != GRAMMAR.accept:
            following = GRAMMAR.step[state]
            good = following != GRAMMAR.dead if len(text) < stay else away[following] == away[state] - 1
            byte = int(rng.choice(np.flatnonzero(good)))
            text, state = text + bytes([byte]), int(following[byte])
        chain = parse_chain(text.decode())
        assert chain.format_ok and chain.reward_ok


BLANK = ["", " ", "\n\t", "\x00", "\xa0", "\u2003", "\u3000 ", "\u200b", "\ufeff"]


@pytest.mark.parametrize("nothing", BLANK)
@pytest.mark.parametrize("block", ["thinking", "analyze", "response"])
def test_a_block_that_says_nothing_is_refused(block, nothing):
    matrix = payoff_json(np.zeros((2, 3, 2)))
    texts = {"thinking": "t", "analyze": "日", "response": "<", block: nothing}
    whole = [f"<{name}>{text}</{name}>" for name, text in texts.items()]
    whole.insert(1, f"<payoff>\n{matrix}\n</payoff>")
    assert not accepts(GRAMMAR, "\n".join(whole))
    assert accepts(GRAMMAR, "\n".join(whole).replace(f"<{block}>", f"<{block}>é"))


@pytest.mark.parametrize("text", ["", "\ud800", payoff_json(np.zeros((2, 3, 2)))])
def test_other_text_is_refused(text):
    assert not accepts(GRAMMAR, text)
