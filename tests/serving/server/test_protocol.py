"""Whatever JSON comes, it is a request or one line that refuses it."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gtalign_jax.game.moves import KEYS as CELLS
from gtalign_jax.serving.server.ask import ApiError, Ask, Bounds, Defaults
from gtalign_jax.serving.server.fields import FIELDS
from gtalign_jax.serving.server.protocol import ABSENT, LABELS, parse_json, read_ask
from gtalign_jax.serving.server.text import MODES

BOUNDS = Bounds(tokens=100, choices=8, policies=("per_token", "none"))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "text", "per_token", "none", *MODES])
)
KEYS = st.sampled_from(
    ["role", "content", "type", "text", "policy", "price", "matrix", "include_usage"]
) | st.text(max_size=4)
VALUES = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=4) | st.dictionaries(KEYS, x, max_size=4), max_leaves=8
)
NAMES = st.sampled_from(
    [*FIELDS, *ABSENT, *LABELS, "prompt", "messages", "logprobs", "top_logprobs", "continue_final_message"]
)


def refused(read):
    """What is read; None when it is refused in one line."""
    try:
        return read()
    except ApiError as error:
        said = error
    assert said.status == 400 and said.message and "\n" not in said.message
    json.dumps(said.body(), allow_nan=False)
    return None


@settings(max_examples=200)
@given(body=st.dictionaries(NAMES, VALUES, max_size=6), chat=st.booleans())
@example({"prompt": "a", "stop": {"a": 1}}, False)
@example({"messages": [{"role": {}, "content": []}]}, True)
@example({"prompt": [[]], "n": 10**30}, False)
@example({"prompt": "a", "pricing": {"policy": {}, "price": 1}}, False)
@example({"prompt": "a", "logprobs": [1]}, False)
@example({"prompt": "a", "best_of": {}}, False)
@example({"prompt": "a", "echo": True, "max_tokens": 0}, False)
@example({"prompt": "a", "max_tokens": 0}, False)
def test_any_json_is_a_request_or_a_line(body, chat):
    said = {**({"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}), **body}
    ask = refused(lambda: read_ask(parse_json(json.dumps(said).encode()), chat, Defaults(), BOUNDS))
    if ask is None:
        return
    assert isinstance(ask, Ask) and 1 <= len(ask.prompts) * ask.n <= BOUNDS.choices
    assert ask.max_tokens is None or int(not ask.echo) <= ask.max_tokens <= BOUNDS.tokens
    assert 0 <= ask.temperature <= 2 and 0 < ask.top_p <= 1 and len(ask.stop) <= 4


@settings(max_examples=100)
@given(st.binary(max_size=60))
@example(b'{"a": "\\ud83d"}')
@example(b"\xef\xbb\xbf{}")
@example(b"[" * 100_000)
@example(b'{"a": 1e999}')
def test_any_bytes_are_an_object_or_a_line(body):
    found = refused(lambda: parse_json(body))
    assert found is None or isinstance(found, dict)


MATRIX = {key: {"LLM": i, "user": -i / 2} for i, key in enumerate(CELLS)}


def priced(matrix):
    pricing = {"policy": "none", "price": 0, "matrix": matrix}
    return read_ask({"prompt": "a", "pricing": pricing}, False, Defaults(), BOUNDS).pricing


def test_a_price_may_be_put_on_a_matrix_of_the_request():
    assert priced(None).matrix is None
    assert priced(MATRIX).matrix == (5, -2.5, 4, -2, 3, -1.5, 2, -1, 1, -0.5, 0, 0)  # VQ before DQ, DA first


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        ([], "pricing.matrix: "),
        ("{}", "pricing.matrix: "),
        ({}, "pricing.matrix.DQ_AQ: missing"),
        ({**MATRIX, "DA": {"LLM": 1, "user": 1}}, "not a cell"),
        ({**MATRIX, "DQ_DA": {"LLM": 1}}, "pricing.matrix.DQ_DA: must hold LLM and user"),
        ({**MATRIX, "DQ_DA": {"LLM": 1, "user": True}}, "pricing.matrix.DQ_DA.user: "),
        ({**MATRIX, "DQ_DA": {"LLM": 1, "user": 10**400}}, "pricing.matrix.DQ_DA.user: "),
        ({**MATRIX, "x" * 5000: 0}, "over 4000"),
    ],
)
def test_a_matrix_that_is_none_is_refused_with_its_cell(matrix, said):
    with pytest.raises(ApiError, match=said) as refusal:
        priced(matrix)
    assert refusal.value.status == 400 and refusal.value.param == "pricing.matrix"
