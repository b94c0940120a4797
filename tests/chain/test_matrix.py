"""The payoff matrix as text: accepted spellings, refused ones with the reason, agreement with `json`."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtalign_jax.chain.matrix import MAX_PAYOFF, MAX_PAYOFF_CHARS, parse_payoff, parse_row, to_array
from gtalign_jax.chain.prompt import payoff_json
from gtalign_jax.game.moves import KEYS

MATRIX = np.arange(12.0).reshape(2, 3, 2) / 10 - 0.4
TEXT = payoff_json(MATRIX)
VALUE = json.loads(TEXT)


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        json.dumps(VALUE, indent=2),
        json.dumps(dict(reversed(VALUE.items()))),
        str(VALUE),
        TEXT.replace('"', "'"),
        TEXT.replace('"', "”"),
        TEXT.replace("DQ_AQ", "\\u0044Q_AQ"),
        TEXT.replace("}", ",}"),
        TEXT.replace("0.5", "+.5"),
        TEXT.replace("0.5", "5e-1"),
        TEXT.replace(" ", "\u00a0\n"),
    ],
)
def test_spellings_of_the_same_matrix(text):
    payoff, errors = parse_payoff(text)
    assert errors == []
    assert payoff == VALUE and tuple(payoff) == KEYS
    np.testing.assert_array_equal(to_array(payoff), MATRIX.round(1))


def test_code_fences_count_only_when_asked():
    fenced = f"```json\n{TEXT}\n```"
    assert parse_payoff(fenced)[0] is None
    assert parse_payoff(fenced, code_fences=True)[0] == VALUE
    assert parse_payoff(TEXT, code_fences=True)[0] == VALUE
    assert parse_payoff("```" * 600, code_fences=True)[0] is None


FIRST = '"DQ_AQ": {"LLM": 0.6, "user": 0.7}'
assert FIRST in TEXT


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "payoff: not a JSON object"),
        ("[]", "payoff: unreadable at character 0"),
        ("{}", "payoff.DQ_AQ: missing"),
        ('{"a"', "payoff: ':' should follow 'a'"),
        (TEXT + TEXT, "payoff: text after the object"),
        (TEXT[:-1], "payoff: ',' or '}' should stand"),
        (TEXT.replace(FIRST, '"DQ_AQ": 1'), "payoff.DQ_AQ: must hold LLM and user"),
        (TEXT.replace(FIRST, f"{FIRST}, {FIRST}"), "payoff.DQ_AQ: written 2 times"),
        (TEXT.replace(FIRST, f'{FIRST}, "AA": 1'), "payoff.'AA': not a cell"),
        (TEXT.replace("0.6", '0.6, "LLM": 0.6'), "payoff.DQ_AQ: must hold LLM and user"),
        (TEXT.replace("0.6", "true"), "payoff.DQ_AQ.LLM: 'true' is not a number"),
        (TEXT.replace("0.6", "NaN"), "payoff.DQ_AQ.LLM: 'NaN' is not a number"),
        (TEXT.replace("0.6", "1e999"), "payoff.DQ_AQ.LLM: inf is not a number within"),
        (TEXT.replace("0.6", "1" * 3000), "payoff.DQ_AQ.LLM: inf is not a number within"),
        (TEXT.replace("0.6", "-1000000.5"), "payoff.DQ_AQ.LLM: -1000000.5 is not a number within"),
        (TEXT.replace("0.6", '"0.6"'), "payoff.DQ_AQ.LLM: '0.6' is not a number"),
        (TEXT.replace("0.6", "{}"), "payoff: a value should stand"),
        (TEXT.replace("0.6", "0x10"), "payoff: ',' or '}' should stand"),
        (TEXT.replace("0.6", "1+1j"), "payoff: ',' or '}' should stand"),
        (TEXT.replace("0.6", "[1]"), "payoff: unreadable at character"),
        (TEXT.replace("0.6", "2**9"), "payoff: unreadable at character"),
        (TEXT.replace('"DQ_AQ"', '"\\x"'), "payoff: a broken string"),
        ("{" * 3000, "payoff: a quoted key should stand at character 1"),
        ('{"a":' * 700, "payoff: a value should stand at character"),
        ("-" * 3999 + "1", "payoff: unreadable at character 0"),
        ("x" * (MAX_PAYOFF_CHARS + 1), "payoff: 4001 characters, over 4000"),
    ],
)
def test_refusals_name_the_place(text, reason):
    payoff, errors = parse_payoff(text)
    assert payoff is None
    assert any(error.startswith(reason) for error in errors), errors


scalars = st.one_of(
    st.floats(-100, 100), st.integers(-5, 5), st.booleans(), st.none(), st.just(1e300), st.text(max_size=3)
)
cells = st.dictionaries(st.sampled_from(["LLM", "user", "x"]), scalars, min_size=1, max_size=3)
good_cells = st.fixed_dictionaries({"LLM": st.floats(-100, 100), "user": st.integers(-5, 5)})
values = st.one_of(
    st.fixed_dictionaries(dict.fromkeys(KEYS, good_cells)),
    st.fixed_dictionaries(dict.fromkeys(KEYS, st.one_of(good_cells, cells))),
    st.dictionaries(st.sampled_from([*KEYS, "AQ"]), st.one_of(good_cells, scalars), max_size=7),
)


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_PAYOFF


@given(values, st.randoms(use_true_random=False), st.sampled_from([None, 1]))
@settings(max_examples=500)
def test_accepts_exactly_the_valid_values_that_json_writes(value, random, indent):
    keys = list(value)
    random.shuffle(keys)
    text = json.dumps({key: value[key] for key in keys}, indent=indent)
    payoff, errors = parse_payoff(text)
    valid = set(value) == set(KEYS) and all(
        isinstance(cell, dict) and set(cell) == {"LLM", "user"} and all(map(_is_number, cell.values()))
        for cell in value.values()
    )
    assert (payoff == value) if valid else (payoff is None)
    assert (errors == []) == valid


def test_rows_stand_in_the_order_of_the_array():
    row, _ = parse_row(TEXT)
    np.testing.assert_array_equal(np.reshape(row, (2, 3, 2)), MATRIX.round(1))
