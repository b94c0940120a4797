"""Steering resumes the very sequence it edited, and a model that reads its matrix changes its mind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.chain.prompt import format_chain, payoff_json
from gtalign_jax.chain.solver import solver_analysis
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.errors import UserError
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.transformer import forward, init_params, unembed
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generate
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.sampling import GREEDY, SamplingConfig
from gtalign_jax.serving.solution import solution
from gtalign_jax.serving.splice import splice_payoff
from gtalign_jax.serving.steer import Options, steer

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
    tokenizer = train_tokenizer([*CHAINS.values(), PROMPT] * 3, 431)
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
def params(engine, teach):
    """A model taught both chains, the clarifying matrix twice as often as the other."""
    prompt = engine_lib.encode(engine, PROMPT)
    names = ("CQ", "CQ", "DA")
    return teach(
        engine, [prompt + engine_lib.encode(engine, CHAINS[name]) + list(engine.eos_ids) for name in names]
    )


def to_answer(payoff):
    return payoff + (ANSWER - CLARIFY)


@pytest.fixture(scope="module")
def steered(engine, params):
    return steer(engine, params, [PROMPT], [to_answer], jax.random.key(0), Options(BUDGET))[0]


def test_the_edit_changes_the_matrix_the_choice_and_the_answer(steered):
    np.testing.assert_array_equal(steered.original.payoff, CLARIFY)
    np.testing.assert_array_equal(steered.edited[0].payoff, ANSWER)
    assert (steered.original.action, steered.edited[0].action) == ("CQ", "DA")
    assert steered.original.text == CHAINS["CQ"] and steered.edited[0].text == CHAINS["DA"]


def test_the_resumed_sequence_continues_the_spliced_prefix_token_for_token(engine, steered):
    splice, ids = steered.edited[0].splice, steered.edited[0].token_ids
    prefix = splice.prefix
    assert ids[: len(prefix)] == prefix and len(ids) > len(prefix)
    assert prefix[: splice.kept] == steered.original.token_ids[: splice.kept]
    text = engine_lib.decode_tokens(engine, prefix)
    assert text.rstrip().endswith("</payoff>") and payoff_json(ANSWER) in text
    kept = engine_lib.decode_tokens(engine, prefix[: splice.kept])
    assert kept.rstrip().endswith("<payoff>")


def test_the_continuation_is_what_the_model_says_after_the_prefix(engine, params, steered):
    """Without any cache: the argmax of the whole row at every place after the splice."""
    prompt = engine_lib.encode(engine, PROMPT)
    row = np.array([*prompt, *steered.edited[0].token_ids])[None]

    @jax.jit
    def argmax(params, row):
        hidden = forward(params, engine.model_config, row, jnp.asarray([row.size]))
        return unembed(params, engine.model_config, hidden)[0].argmax(-1)

    greedy = np.asarray(argmax(params, row))
    start = len(prompt) + len(steered.edited[0].splice.prefix)
    np.testing.assert_array_equal(row[0, start:], greedy[start - 1 : -1])


def test_the_original_branch_is_an_uninterrupted_generation(engine, params, steered):
    batch = engine_lib.prompt_batch(engine, [engine_lib.encode(engine, PROMPT)])
    rollout = generate.rollout(engine, params, Request(batch, jax.random.key(0), 1, BUDGET))
    assert list(steered.original.token_ids) == engine_lib.completion_ids(rollout.completions)[0].tolist()


def one(engine, params, edit, budget):
    return steer(engine, params, [PROMPT], [edit], jax.random.key(0), Options(budget))


def test_no_usable_matrix_is_said_in_one_line(engine, params):
    with pytest.raises(UserError, match="no usable matrix"):
        one(engine, params, lambda p: p, 20)
    with pytest.raises(UserError, match="no usable matrix"):
        one(engine, _random_params(1, engine), lambda p: p, BUDGET)


def test_an_edit_that_leaves_no_room_is_refused(engine, params, steered):
    budget = len(steered.edited[0].splice.prefix)
    with pytest.raises(UserError, match=f"max_new_tokens={budget}: the edited matrix ends at"):
        one(engine, params, lambda p: p - 1000.0, budget)


def test_many_prompts_and_edits_are_steered_as_each_alone(engine, params, steered):
    """Rows that keep different numbers of tokens, and one that has no matrix, go through one state."""
    prompts = [PROMPT, "Which", PROMPT + " Which train do you mean?"]
    edits = [to_answer, lambda payoff: payoff]
    options = Options(BUDGET, unusable="unsteered")
    together = steer(engine, params, prompts, edits, jax.random.key(0), options)
    assert {bool(row.failure) for row in together} == {True, False}
    assert len({row.original.splice.kept for row in together}) > 1
    for prompt, row in zip(prompts, together, strict=True):
        alone = steer(engine, params, [prompt], edits, jax.random.key(0), options)[0]
        assert row.failure == alone.failure
        assert row.original.token_ids == alone.original.token_ids
        assert [b.token_ids for b in row.edited] == [b.token_ids for b in alone.edited]
    assert together[0].edited[0].token_ids == steered.edited[0].token_ids
    assert together[0].edited[1].text == together[0].original.text


def test_the_solver_writes_the_analysis_and_the_model_obeys(engine, params):
    options = Options(BUDGET, analyze="solver")
    row = steer(engine, params, [PROMPT], [to_answer], jax.random.key(0), options)[0]
    branch = row.edited[0]
    assert branch.action == solution(ANSWER)["action"]
    assert f"<analyze>\n{solver_analysis(ANSWER)}\n</analyze>\n<response>\n" in branch.text
    forced = engine_lib.decode_tokens(engine, branch.splice.prefix)
    assert branch.text.startswith(forced) and forced.endswith("<response>\n")
    assert len(branch.token_ids) > len(branch.splice.prefix)


def test_a_prompt_without_a_matrix_goes_on_unsteered_and_says_why(engine):
    params = _random_params(1, engine)
    options = Options(24, unusable="unsteered")
    row = steer(engine, params, [PROMPT], [to_answer], jax.random.key(0), options)[0]
    assert not row.edited and "no usable matrix" in row.failure
    batch = engine_lib.prompt_batch(engine, [engine_lib.encode(engine, PROMPT)])
    whole = generate.rollout(engine, params, Request(batch, jax.random.key(0), 1, 24))
    assert list(row.original.token_ids) == engine_lib.completion_ids(whole.completions)[0].tolist()


def test_a_second_try_draws_otherwise(engine, params):
    """Hot enough that a matrix is now and then not one; those that were one stay as they are."""
    hot = dataclasses.replace(engine, sampling=SamplingConfig(temperature=1.2))
    prompts = [PROMPT] * 16

    def steered(unusable):
        options = Options(BUDGET, unusable=unusable)
        return steer(hot, params, prompts, [to_answer], jax.random.key(2), options)

    once, twice = steered("unsteered"), steered("again")
    failed = [bool(row.failure) for row in once]
    assert sum(bool(row.failure) for row in twice) < sum(failed) < len(prompts)
    for was, now in zip(once, twice, strict=True):
        assert (was.original.token_ids == now.original.token_ids) == (was.failure is None)


def test_a_second_try_is_under_the_grammar(engine):
    """A random model writes no matrix by itself; under the grammar it must."""
    params, budget = _random_params(1, engine), 512
    constraint = engine_lib.make_constraint(engine)
    wide = dataclasses.replace(engine, buckets=BucketConfig(prompt=(32,), completion=(budget,)))
    options = Options(budget, unusable="grammar")
    with pytest.raises(ValueError, match="needs the constraint"):
        steer(wide, params, [PROMPT], [to_answer], jax.random.key(0), options)
    row = steer(wide, params, [PROMPT], [to_answer], jax.random.key(0), options, constraint=constraint)[0]
    assert row.failure is None and row.edited[0].payoff is not None


@pytest.mark.parametrize("gap", ["", "\n", " \n "])
@pytest.mark.parametrize("tail", ["", "\n", "\n<"])
def test_a_splice_replaces_the_matrix_and_nothing_else(engine, gap, tail):
    """White space around the matrix, and text that the closing token carries along, are kept."""
    head = f"<thinking>\nA <b> é\n</thinking>\n<payoff>{gap}"
    rest = f"{gap}</payoff>{tail}"
    ids = engine_lib.encode(engine, head + payoff_json(CLARIFY) + rest)
    splice = splice_payoff(engine, ids, ANSWER)
    assert engine_lib.decode_tokens(engine, splice.prefix) == head + payoff_json(ANSWER) + rest
    assert list(splice.prefix[: splice.kept]) == ids[: splice.kept]
    assert head.startswith(engine_lib.decode_tokens(engine, ids[: splice.kept]))
