"""A small byte-level tokenizer with a chat template."""

import pytest

from gtalign_jax.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["the payoff of a clear question </payoff>\n"] * 3, 300)
