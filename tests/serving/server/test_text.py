"""Text that comes in pieces says what it would say whole, and never takes anything back."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtalign_jax.chain.prompt import format_chain
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.serving.server.text import APART, HIDDEN, MODES, SHOWN, TextStream, View

CHAIN = format_chain("Naïve → 日本語 🙂.", "{}", "I choose DA.", "At <b>noon</b>.\n\nOr é later.")


@pytest.fixture(scope="module")
def engine():
    tokenizer = train_tokenizer(["the payoff of a clear question\n"] * 3, 450)
    return Engine(tokenizer, ModelConfig(vocab_size=len(tokenizer)), (tokenizer.eos_token_id,))


def pieces(engine, ids, stops=(), size=1):
    stream = TextStream(engine, stops)
    found = [stream.feed(ids[i : i + size], [0.0] * len(ids[i : i + size])) for i in range(0, len(ids), size)]
    return [*found, stream.end()]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_pieces_make_the_whole_text_and_name_every_token(engine, size):
    ids = engine_lib.encode(engine, CHAIN)
    found = pieces(engine, ids, size=size)
    assert "".join(p.text for p in found) == engine_lib.decode_tokens(engine, ids) == CHAIN
    assert [token.id for p in found for token in p.tokens] == ids
    assert not any("\ufffd" in p.text for p in found)


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_tokens_that_no_text_stands_for_are_named_too(engine, size):
    """As of a table that is wider than the tokenizer: between others and at the end."""
    unknown = len(engine.tokenizer) + 2
    ids = [*engine_lib.encode(engine, "a clear"), unknown, *engine_lib.encode(engine, " question"), unknown]
    found = pieces(engine, ids, size=size)
    assert "".join(p.text for p in found) == "a clear question"
    assert [token.id for p in found for token in p.tokens] == ids


def test_a_character_that_never_ends_is_said_at_the_end(engine):
    ids = engine_lib.encode(engine, "a 🙂")[:-1]
    found = pieces(engine, ids)
    assert "".join(p.text for p in found) == engine_lib.decode_tokens(engine, ids)
    assert found[-1].text == "\ufffd"


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("stops", "left"),
    [
        (("</payoff>",), "</payoff>"),
        (("x", "日本", "never"), "日本"),
        (("choose DA", "I choose"), "I choose"),
        ((CHAIN[:4],), CHAIN),
        (("nowhere at all",), ""),
    ],
)
def test_a_stop_string_ends_the_text_before_its_first_character(engine, stops, left, size):
    ids = engine_lib.encode(engine, CHAIN)
    found = pieces(engine, ids, stops, size)
    text = "".join(p.text for p in found)
    assert text == (CHAIN[: CHAIN.index(left)] if left else CHAIN)
    assert found[-1].stopped == bool(left)
    first = next((i for i, p in enumerate(found) if p.stopped), len(found))
    assert not any(p.text or p.tokens for p in found[first + 1 :])
    spoken = [token for p in found for token in p.tokens]
    assert all(token.at < len(text) for token in spoken)


@given(text=st.text(alphabet="ab<>/respon \n", max_size=60), seed=st.integers(0, 99))
def test_a_view_in_pieces_is_the_view_of_the_whole(text, seed):
    cut = random.Random(seed)
    for mode in MODES:
        whole, parts = View(mode), View(mode)
        expected = [whole.feed(text), whole.end()]
        found, at = [], 0
        while at < len(text):
            step = cut.randint(1, 9)
            found.append(parts.feed(text[at : at + step]))
            at += step
        found.append(parts.end())
        for name in ("reasoning", "content"):
            assert "".join(getattr(x, name) for x in found) == "".join(getattr(x, name) for x in expected)


def shown(mode, text):
    view = View(mode)
    parts = [*map(view.feed, text), view.end()]
    return "".join(x.reasoning for x in parts), "".join(x.content for x in parts)


def test_the_three_views_of_a_chain():
    before, response = CHAIN.split("<response>")[0], "At <b>noon</b>.\n\nOr é later."
    assert shown(SHOWN, CHAIN) == ("", CHAIN)
    assert shown(HIDDEN, CHAIN + "\nmore </response> <response>x") == ("", response)
    assert shown(APART, CHAIN) == (before, response)
    assert shown(HIDDEN, "no chain at all <respons") == ("", "")
    assert shown(APART, "no chain at all <respons") == ("no chain at all <respons", "")
    assert shown(HIDDEN, "<response> \n cut short </resp ") == ("", "cut short </resp")
