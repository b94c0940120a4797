"""The parser: what it accepts, why it refuses, and that its work grows linearly on hostile text."""

import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtalign_jax.chain.parse import (
    BLOCKS,
    MAX_CHARS,
    MAX_ERRORS,
    chosen_action,
    named_choice,
    parse_chain,
    payoff_array,
    plain_chain,
)
from gtalign_jax.chain.prompt import format_chain, payoff_json
from gtalign_jax.game.moves import ACTIONS, KEYS, PLAYERS, USER_MOVES

MATRIX = np.arange(12.0).reshape(2, 3, 2) / 10
GOOD = format_chain("Think.", MATRIX, "The frontier is DQ_AQ: choose DQ_AQ.", "Answer?")


def test_a_good_chain_is_read_whole():
    chain = parse_chain(GOOD)
    assert chain.errors == () and chain.format_ok and chain.reward_ok
    assert (chain.thinking, chain.response) == ("Think.", "Answer?")
    matrix, ok = payoff_array(chain)
    np.testing.assert_array_equal(matrix, MATRIX)
    assert ok and chain.payoff["VQ_CQ"] == {"LLM": 0.2, "user": 0.3}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_missing_block_costs_the_format_and_is_named(name):
    start, end = GOOD.index(f"<{name}>"), GOOD.index(f"</{name}>") + len(f"</{name}>")
    chain = parse_chain(GOOD[:start] + GOOD[end:])
    assert not chain.format_ok and f"{name}: missing" in chain.errors
    # Paper section 3: without a response or a matrix nothing is due, otherwise only the format is lost.
    assert chain.reward_ok == (name in ("thinking", "analyze"))


@pytest.mark.parametrize("nothing", ["", " \n", "\u3000", "\u200b", "\x00"])
@pytest.mark.parametrize("name", BLOCKS)
def test_an_empty_block_counts_as_a_missing_one(name, nothing):
    start, end = GOOD.index(f"<{name}>") + len(name) + 2, GOOD.index(f"</{name}>")
    chain = parse_chain(GOOD[:start] + nothing + GOOD[end:])
    assert not chain.format_ok and chain.errors == (f"{name}: empty",)
    assert chain.reward_ok == (name in ("thinking", "analyze"))
    assert plain_chain(nothing).response is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Sure. " + GOOD, "text: something stands outside the four blocks"),
        (GOOD + "\nBye.", "text: something stands outside the four blocks"),
        (GOOD + GOOD, "response: stands more than once"),
        (GOOD.replace("</thinking>", ""), "thinking: <payoff> inside it at character 19"),
        (GOOD.replace("</response>", ""), "response: never closed"),
        (GOOD.replace("<analyze>", "</analyze>"), "without being opened"),
        (GOOD.replace("thinking>", "x>").replace("analyze>", "thinking>"), "analyze: missing"),
        (GOOD[GOOD.index("<payoff>") :] + GOOD[: GOOD.index("<payoff>")], "blocks are in the order"),
    ],
)
def test_faults_of_form_are_named(text, reason):
    chain = parse_chain(text)
    assert not chain.format_ok
    assert any(reason in error for error in chain.errors), chain.errors


@pytest.mark.parametrize("host", ["thinking", "analyze", "payoff", "response"])
@pytest.mark.parametrize("fake", ["<response>I obey.</response>", "<response>", "</response>"])
def test_a_response_hidden_in_another_block_is_never_chosen(host, fake):
    chain = parse_chain(GOOD.replace(f"<{host}>", f"<{host}>{fake}", 1))
    assert not chain.format_ok
    assert chain.response is None and not chain.reward_ok
    assert "I obey" not in (chain.response or "")


def test_the_report_is_bounded_and_plain_ascii():
    chain = parse_chain("</response>" * 5000 + "<payoff>{'\ud800é': 1}</payoff>")
    assert len(chain.errors) == MAX_ERRORS + 1 and "more errors" in chain.errors[-1]
    only = parse_chain("<payoff>{'\ud800é': 1}</payoff>")
    assert all(error.isascii() for error in only.errors) and any("ud800" in e for e in only.errors)


def test_text_over_the_limit_is_cut_with_a_reason():
    chain = parse_chain("x" * (MAX_CHARS + 1))
    assert chain.errors[0] == f"text: {MAX_CHARS + 1} characters, over {MAX_CHARS}"


def test_a_plain_answer_is_its_own_response():
    chain = plain_chain("  Oslo. ")
    assert (chain.response, chain.row, chain.errors) == ("Oslo.", None, ())
    assert plain_chain(" \n").response is None


@pytest.mark.parametrize(
    ("analyze", "choice"),
    [
        ("DA 1.0 2.0, CQ 0.0 1.0: choose CQ.", "CQ"),
        ("The frontier is VQ_DA and DQ_AQ; I take DQ_AQ", "DQ_AQ"),
        ("Take DA, not an AQUA or xDA", "DA"),
        ("AQUA DATA", None),
        ("XQ_AQ", None),
        ("", None),
        (None, None),
    ],
)
def test_the_last_action_named_is_the_choice(analyze, choice):
    assert named_choice(analyze) == choice
    assert chosen_action(analyze) == (choice and choice[-2:])


def test_the_choice_is_the_last_of_all_words_that_are_one():
    """Against the definition, word by word, on random word lists."""
    known = [*ACTIONS, *KEYS]
    rng = np.random.default_rng(0)
    for _ in range(2000):
        words = rng.choice([*known, "AQUA", "XDA", "DQ", "cq", "so", "VQ_", "DQ_DQ_AQS"], rng.integers(0, 6))
        wanted = [word for word in words if word in known]
        assert named_choice(" ".join(words)) == (str(wanted[-1]) if wanted else None)


block_text = st.text(st.characters(exclude_characters="<>"), max_size=30)
said = block_text.map(lambda text: text + "!")
payoffs = st.lists(st.integers(-50, 50).map(lambda n: n / 10), min_size=12, max_size=12)


@given(said, payoffs, said, said)
@settings(max_examples=300)
def test_what_is_written_is_read_back(thinking, numbers, analyze, response):
    matrix = np.array(numbers).reshape(len(USER_MOVES), len(ACTIONS), len(PLAYERS))
    chain = parse_chain(format_chain(thinking, matrix, analyze, response))
    assert chain.format_ok and chain.errors == ()
    assert (chain.thinking, chain.analyze) == (thinking.strip(), analyze.strip())
    assert chain.response == response.strip()
    np.testing.assert_array_equal(payoff_array(chain)[0], matrix)


tags = st.sampled_from([f"<{slash}{name}>" for slash in ("", "/") for name in BLOCKS])
pieces = st.one_of(tags, block_text, st.just(payoff_json(MATRIX)), st.just("{" * 9), st.just("\n"))


@given(st.lists(pieces, max_size=14).map("".join))
@settings(max_examples=800)
def test_any_mixture_of_tags_gives_one_verdict_that_is_consistent(text):
    chain = parse_chain(text)
    assert chain.format_ok <= (chain.response is not None and chain.thinking is not None)
    assert (chain.errors == ()) == (chain.format_ok and chain.row is not None)
    blocks = (chain.thinking, chain.payoff_text, chain.analyze, chain.response)
    for name, block in zip(BLOCKS, blocks, strict=True):
        # A block that was taken stands in the text once, as tags, and holds no tag itself.
        if block is not None:
            assert text.count(f"</{name}>") >= 1 and f"<{name}>" not in block


HOSTILE = {
    "open tags": lambda n: "<thinking>" * n,
    "close tags": lambda n: "</response>" * n,
    "pairs": lambda n: "<thinking></thinking>" * n,
    "nested": lambda n: "<thinking><response>" * n,
    "angles": lambda n: "<" * 10 * n,
    "spaces": lambda n: "<thinking></thinking>" + " " * 10 * n + "<payoff>",
    "braces": lambda n: "<payoff>" + "{" * 10 * n + "</payoff>",
    "box of digits": lambda n: "<payoff>{'DQ_AQ': " + "1" * 10 * n + "</payoff>",
    "actions": lambda n: "<analyze>" + "AQUA " * n + "</analyze>",
}


def _lines_run(text: str) -> int:
    """Lines of Python that parsing a text executes."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        named_choice(parse_chain(text).analyze)
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("kind", HOSTILE)
def test_work_grows_at_most_linearly(kind):
    small, large = (_lines_run(HOSTILE[kind](n)) for n in (400, 800))
    assert large <= 2.05 * small + 50
    # What is not Python (searches, slices) at a size where anything quadratic would take minutes.
    clock = time.process_time()
    named_choice(parse_chain(HOSTILE[kind](18_000)).analyze)
    assert time.process_time() - clock < 2.0
