"""The tokenizer made from scratch: read back by AutoTokenizer as itself, and stable around a matrix."""

import json
import re

import numpy as np
import pytest

from gtalign_jax.chain.prompt import analysis_text, format_chain, payoff_json
from gtalign_jax.data.tokenizer import END, protocol_strings, train_tokenizer
from gtalign_jax.rollout.folder import load_tokenizer

TEXT = "How many apples has Ann now? Ann has 10 apples, and Zoë said “hello” 漢字 🙂.\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 4, 600)


@pytest.fixture(scope="module")
def reloaded(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return load_tokenizer(folder, chat=True)


def chain(seed):
    matrix = np.random.default_rng(seed).uniform(-5, 5, (2, 3, 2))
    return format_chain("Think 1.5 times.", matrix, "DA 1.0 2.0: choose DA.", TEXT)


def test_a_saved_tokenizer_comes_back_with_the_same_tokens(tokenizer, reloaded):
    assert len(tokenizer) == len(reloaded) <= 600
    for text in (TEXT, chain(0), TEXT + chain(1)):
        ids = tokenizer(text)["input_ids"]
        assert ids == reloaded(text)["input_ids"]
        assert reloaded.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


def test_protocol_strings_are_single_tokens(reloaded):
    for text in protocol_strings():
        assert len(reloaded(text)["input_ids"]) == 1, text


def test_matrices_differ_only_in_their_payoffs(reloaded):
    a, b = (reloaded(payoff_json(np.full((2, 3, 2), x)))["input_ids"] for x in (1.5, -4.0))
    assert len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 12


@pytest.mark.parametrize(
    "cells", [((1.5, -3.5), (5.0, 5.0), (-5.0, 2.5)), ((0.0, 0.1), (2.5, 3.0), (4.5, 4.0))]
)
def test_the_decimals_of_a_welfare_are_digits(reloaded, cells):
    text = analysis_text(cells, "CQ")
    tokens = [reloaded.decode([i]) for i in reloaded(text)["input_ids"]]
    units = [i for i, token in enumerate(tokens) if token.startswith(" = ")]
    found = ["".join(tokens[i : i + 3]) for i in units]
    assert found == re.findall(r" = \d+\.\d\d", text) and len(found) == 3
    assert [tokens[i - 2 : i] for i in units] == [[f" {llm:.1f}", f" {user:.1f}"] for llm, user in cells]


def test_the_chat_template_ends_turns_with_the_end_token(reloaded):
    text = reloaded.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert reloaded.eos_token == END and reloaded(END)["input_ids"] == [reloaded.eos_token_id]


def test_training_is_deterministic(tokenizer):
    again = train_tokenizer([TEXT] * 4, 600)
    assert tokenizer.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
