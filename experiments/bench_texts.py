"""Models for benchmarks of servers, which take text: weights with a tokenizer, and a chain known by heart."""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import numpy as np
import optax
from transformers import PreTrainedTokenizerBase

from experiments import bench_common as common
from gtalign_jax.chain.prompt import format_chain
from gtalign_jax.chain.solver import solver_analysis
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.models import hf
from gtalign_jax.models.config import ModelConfig, RuntimeConfig, read_config
from gtalign_jax.models.transformer import forward, unembed
from gtalign_jax.types import Array, PyTree

REPO = pathlib.Path(__file__).parent.parent
MATRIX = np.array([[[1.5, 2.0], [0.5, -1.0], [2.5, 2.5]], [[2.0, 2.5], [-0.5, 0.5], [2.5, 3.0]]])
THINKING = "The user names no train. A guess may be wrong, so both can be had: answer first, then ask."
RESPONSE = (
    "The next one leaves at noon from the north side, and the last one at nine. Which of them do you mean?"
)
# The whole vocabulary is drawn from, and no end token of the model's own ends an answer.
GENERATION = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
STEPS, RATE, KNOWN = 1000, 1e-3, 0.05  # at most so many, until the loss is that


@functools.cache
def make_tokenizer(vocab: int) -> PreTrainedTokenizerBase:
    """Byte pairs of this project's text, in the model's own kind of tokenizer."""
    folders = ("gtalign_jax", "experiments", "tests", "docs")
    files = (path for folder in folders for path in sorted((REPO / folder).rglob("*")))
    texts = [path.read_text() for path in files if path.suffix in (".py", ".md")]
    return train_tokenizer([*texts, chain()], vocab)


def chain() -> str:
    return format_chain(THINKING, MATRIX, solver_analysis(MATRIX), RESPONSE)


@functools.cache
def weights_folder(shape: str, dtype: str) -> tuple[pathlib.Path, PreTrainedTokenizerBase]:
    """The random weights that all benchmarks read, with a tokenizer beside them."""
    folder, tokenizer = (
        common.weights_folder(shape, dtype),
        make_tokenizer(common.SHAPES[shape]["vocab_size"]),
    )
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder, tokenizer


def prompts(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[str]:
    """Texts of words, each of which has so many tokens."""
    words = [token.replace("\u0120", " ") for token in tokenizer.get_vocab() if token.startswith("\u0120")]
    words = sorted(word for word in words if word.strip().isalpha())
    rng, found = np.random.default_rng(0), list[str]()
    while len(found) < count:
        text = "".join(rng.choice(words, length))
        if len(tokenizer(text)["input_ids"]) == length:
            found.append(text)
    return found


@functools.cache
def taught_folder(shape: str, dtype: str, length: int) -> tuple[pathlib.Path, str, int]:
    """(a folder of weights that know one chain by heart, the prompt it follows, tokens of the chain)."""
    source, tokenizer = weights_folder(shape, dtype)
    config = read_config(source, RuntimeConfig(compute_dtype=dtype, param_dtype=dtype))
    (prompt,) = prompts(tokenizer, 1, length)
    written = tokenizer(chain(), add_special_tokens=False)["input_ids"]
    row = [*tokenizer(prompt)["input_ids"], *written, tokenizer.eos_token_id]
    params = learn(config, hf.load_params(source, config), np.array([row], np.int32), length)
    folder = common.scratch_folder("bench-taught-")
    hf.save_params(params, config, folder / "hf", tokenizer=tokenizer)
    return folder / "hf", prompt, len(written) + 1


def learn(config: ModelConfig, params: PyTree, rows: np.ndarray, given: int) -> PyTree:
    """Parameters that write the rows [B, T] after their first `given` tokens. RuntimeError if they do not."""
    optimizer, length = optax.adam(RATE), np.full(len(rows), rows.shape[1], np.int32)

    def loss(params: PyTree) -> Array:
        hidden = forward(params, config, rows, length)[:, given - 1 : -1]
        each = optax.softmax_cross_entropy_with_integer_labels(
            unembed(params, config, hidden), rows[:, given:]
        )
        return each.mean()

    @jax.jit
    def step(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree, Array]:
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, value = optimizer.init(params), np.inf
    for _ in range(STEPS):
        params, state, value = step(params, state)
        if value < KNOWN:
            return params
    raise RuntimeError(f"the chain was not learnt: loss {value:.3f} after {STEPS} steps")
