"""Steering resumes the very sequence it edited, and a model that reads its matrix changes its mind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gtalign_jax.chain.prompt import format_chain, payoff_json
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.errors import UserError
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.transformer import forward, init_params, unembed
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generate
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.sampling import GREEDY
from gtalign_jax.serving.steer import splice_payoff, steer

PROMPT = "Which train do you mean?"
CLARIFY = np.array([[[1, 1], [4, 3], [2, 1]], [[1, 2], [4, 4], [1, 3]]], np.float64)
ANSWER = np.array([[[1, 1], [4, -2], [2, 1]], [[1, 2], [4, -1], [1, 3]]], np.float64)
CHAINS = {
    name: format_chain("A guess may be wrong.", matrix, f"I choose {name}.", response)
    for name, matrix, response in (("CQ", CLARIFY, "Which one?"), ("DA", ANSWER, "At noon."))
}
BUDGET = 192


@pytest.fixture(scope="module")
def engine() -> Engine:
    tokenizer = train_tokenizer([*CHAINS.values(), PROMPT] * 3, 420)
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        initializer_range=0.1,
    )
    buckets = BucketConfig(prompt=(32,), completion=(BUDGET,))
    return Engine(tokenizer, config, (tokenizer.eos_token_id,), GREEDY, buckets)


def _random_params(seed: int, engine: Engine):
    return jax.jit(init_params, static_argnums=1)(jax.random.key(seed), engine.model_config)


@pytest.fixture(scope="module")
def params(engine):
    """A model taught both chains, the clarifying matrix twice as often as the other."""
    prompt = engine_lib.encode(engine, PROMPT)
    rows = [
        prompt + engine_lib.encode(engine, CHAINS[name]) + list(engine.eos_ids) for name in ("CQ", "CQ", "DA")
    ]
    length = np.array([len(row) for row in rows])
    tokens = np.zeros((3, length.max()), np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = values
    mask = np.arange(length.max() - 1) < (length - 1)[:, None]
    optimizer = optax.adam(3e-3)

    def loss(params):
        logits = unembed(params, engine.model_config, forward(params, engine.model_config, tokens, length))
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.sum(each * mask) / jnp.sum(mask)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, opt_state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), length=150)

    (trained, _), losses = train(_random_params(0, engine))
    assert losses[-1] < 0.1
    return trained


@pytest.fixture(scope="module")
def steered(engine, params):
    return steer(
        engine,
        params,
        PROMPT,
        lambda payoff: payoff + (ANSWER - CLARIFY),
        jax.random.key(0),
        max_new_tokens=BUDGET,
    )


def test_the_edit_changes_the_matrix_the_choice_and_the_answer(steered):
    np.testing.assert_array_equal(steered.original.payoff, CLARIFY)
    np.testing.assert_array_equal(steered.edited.payoff, ANSWER)
    assert (steered.original.action, steered.edited.action) == ("CQ", "DA")
    assert steered.original.text == CHAINS["CQ"] and steered.edited.text == CHAINS["DA"]


def test_the_resumed_sequence_continues_the_spliced_prefix_token_for_token(engine, steered):
    prefix, ids = steered.prefix, steered.edited.token_ids
    assert ids[: len(prefix)] == prefix and len(ids) > len(prefix)
    assert prefix[: steered.kept] == steered.original.token_ids[: steered.kept]
    text = engine_lib.decode_tokens(engine, prefix)
    assert text.rstrip().endswith("</payoff>") and payoff_json(ANSWER) in text
    kept = engine_lib.decode_tokens(engine, prefix[: steered.kept])
    assert kept.rstrip().endswith("<payoff>")


def test_the_continuation_is_what_the_model_says_after_the_prefix(engine, params, steered):
    """Without any cache: the argmax of the whole row at every place after the splice."""
    prompt = engine_lib.encode(engine, PROMPT)
    row = np.array([*prompt, *steered.edited.token_ids])[None]

    @jax.jit
    def argmax(params, row):
        hidden = forward(params, engine.model_config, row, jnp.asarray([row.size]))
        return unembed(params, engine.model_config, hidden)[0].argmax(-1)

    greedy = np.asarray(argmax(params, row))
    start = len(prompt) + len(steered.prefix)
    np.testing.assert_array_equal(row[0, start:], greedy[start - 1 : -1])


def test_the_original_branch_is_an_uninterrupted_generation(engine, params, steered):
    batch = engine_lib.prompt_batch(engine, [engine_lib.encode(engine, PROMPT)])
    rollout = generate.rollout(engine, params, Request(batch, jax.random.key(0), 1, BUDGET))
    assert list(steered.original.token_ids) == engine_lib.completion_ids(rollout.completions)[0].tolist()


def test_no_usable_matrix_is_said_in_one_line(engine, params):
    with pytest.raises(UserError, match="no usable matrix"):
        steer(engine, params, PROMPT, lambda p: p, jax.random.key(0), max_new_tokens=20)
    random = _random_params(1, engine)
    with pytest.raises(UserError, match="no usable matrix"):
        steer(engine, random, PROMPT, lambda p: p, jax.random.key(0), max_new_tokens=BUDGET)


def test_an_edit_that_leaves_no_room_is_refused(engine, params, steered):
    budget = len(steered.prefix)
    with pytest.raises(UserError, match=f"max_new_tokens={budget}: the edited matrix ends at"):
        steer(engine, params, PROMPT, lambda p: p - 1000.0, jax.random.key(0), max_new_tokens=budget)


@pytest.mark.parametrize("gap", ["", "\n", " \n "])
@pytest.mark.parametrize("tail", ["", "\n", "\n<"])
def test_a_splice_replaces_the_matrix_and_nothing_else(engine, gap, tail):
    """White space around the matrix, and text that the closing token carries along, are kept."""
    head = f"<thinking>\nA <b> é\n</thinking>\n<payoff>{gap}"
    rest = f"{gap}</payoff>{tail}"
    ids = engine_lib.encode(engine, head + payoff_json(CLARIFY) + rest)
    splice = splice_payoff(engine, ids, payoff_json(ANSWER))
    assert engine_lib.decode_tokens(engine, splice.prefix) == head + payoff_json(ANSWER) + rest
    assert list(splice.prefix[: splice.kept]) == ids[: splice.kept]
    assert head.startswith(engine_lib.decode_tokens(engine, ids[: splice.kept]))
