"""Packed rows against the same chains one by one: gradients, devices, and that no chain sees another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gtalign_jax.data.loader import Demonstration, pad_completions, pad_weights
from gtalign_jax.data.packing import PackedStream
from gtalign_jax.learning.logprobs import packed_scores
from gtalign_jax.learning.sft import PackedBatch, SftBatch, SftSetup, sft_update
from gtalign_jax.learning.state import init_model, init_state
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, place_batch, spread
from gtalign_jax.types import PromptBatch

ROWS, SLOTS, STEP = 8, 12, 0.1


@pytest.fixture(scope="module")
def data():
    """Twenty prompts of 1 to 4 tokens with one completion of 1 to 5 each: they fill eight rows."""
    rng = np.random.default_rng(0)
    draw = lambda top: rng.integers(1, 13, rng.integers(1, top + 1)).tolist()
    return [Demonstration(draw(4), [draw(5)]) for _ in range(20)]


@pytest.fixture(scope="module")
def batch(data):
    """Packed rows with all of the chains that a batch holds."""
    rows = PackedStream(data, ROWS, SLOTS, seed=3).batch(0)
    assert rows.chains > ROWS
    return PackedBatch(rows.tokens, rows.segments, rows.positions, rows.learn)


def chains(batch):
    """(prompt, completion) of every chain."""
    found = []
    for tokens, segments, learn in zip(batch.tokens, batch.segments, batch.learn, strict=True):
        for number in range(1, segments.max() + 1):
            own = segments == number
            found.append((tokens[own & ~learn], tokens[own & learn]))
    return found


def stepped(model, params, batch, microbatches=1):
    """(what a step of plain gradient descent moved, metrics)."""
    sgd = optax.sgd(STEP)
    state = init_state(jax.random.key(0), init_model(jax.tree.map(jnp.copy, params), sgd))
    state, metrics = sft_update(SftSetup(model, sgd, microbatches), state, batch)
    return jax.tree.map(lambda x: np.array(x), state.policy.params), metrics


def test_packed_gradients_are_those_of_the_chains(model, params, batch):
    """The same mean over tokens as one padded row a chain: whole, in micro-batches, on eight devices."""
    apart = chains(batch)
    prompt, prompt_length = (x[:, 0] for x in pad_completions([[p] for p, _ in apart], 4))
    completion, length = pad_completions([[c] for _, c in apart], 5)
    mask = np.arange(5) < length[..., None]
    want, metrics = stepped(model, params, SftBatch(PromptBatch(prompt, prompt_length), completion, mask))
    ends = [stepped(model, params, batch), stepped(model, params, batch, 2)]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        ends.append(stepped(model, spread(params, mesh), place_batch(batch, mesh)))
    for got, found in ends:
        gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), got, want)
        assert max(jax.tree.leaves(gap)) < 1e-5 * STEP * 10
        for name in ("loss/sft", "entropy/mean"):
            assert float(found[name].value) == pytest.approx(float(metrics[name].value), rel=1e-5)
            assert float(found[name].count) == mask.sum()
    moved = jax.tree.map(lambda a, b: np.abs(a - np.asarray(b)).max(), want, params)
    assert min(jax.tree.leaves(moved)) > 1e-4 * STEP


def test_a_chain_sees_no_other(model, params, batch):
    """Another first chain in every row: the logprobs of all other chains stay as they are, to the bit."""
    score = jax.jit(lambda tokens: packed_scores(params, model, tokens, batch.segments, batch.positions).logp)
    first = batch.segments == 1
    before, after = score(batch.tokens), score(np.where(first, (batch.tokens + 1) % 13, batch.tokens))
    others = batch.learn[:, 1:] & (batch.segments[:, 1:] > 1)
    assert others.sum() > 10
    np.testing.assert_array_equal(np.asarray(before)[others], np.asarray(after)[others])
    assert np.abs(np.asarray(before - after))[batch.learn[:, 1:] & first[:, 1:]].max() > 0.01


def test_weighted_tokens_count_by_their_weight_packed_or_not(model, params, batch):
    """Weights of 1 are none, of 0 no token, others a weighted mean: the same in packed and padded rows."""
    rng = np.random.default_rng(5)
    weight = np.where(batch.learn, rng.choice([0.0, 0.5, 1.0, 3.0], batch.learn.shape), 0.0)
    weight = weight.astype(np.float32)
    plain, _ = stepped(model, params, batch)
    ones, _ = stepped(model, params, batch.replace(weight=np.ones_like(weight)))
    some, metrics = stepped(model, params, batch.replace(weight=weight))

    rows, own = [], []
    for tokens, segments, learn, each in zip(batch.tokens, batch.segments, batch.learn, weight, strict=True):
        for number in range(1, segments.max() + 1):
            mine = segments == number
            rows.append((tokens[mine & ~learn], tokens[mine & learn]))
            own.append([each[mine & learn]])
    prompt, prompt_length = (x[:, 0] for x in pad_completions([[p] for p, _ in rows], 4))
    completion, length = pad_completions([[c] for _, c in rows], 5)
    padded = SftBatch(
        PromptBatch(prompt, prompt_length),
        completion,
        np.arange(5) < length[..., None],
        pad_weights(own, 5),
    )
    apart, beside = stepped(model, params, padded)
    for one, two in ((plain, ones), (some, apart)):
        gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, two)
        assert max(jax.tree.leaves(gap)) < 1e-5 * STEP * 10
    assert float(metrics["loss/sft"].count) == pytest.approx(weight.sum())
    assert float(metrics["loss/sft"].value) == pytest.approx(float(beside["loss/sft"].value), rel=1e-5)
    assert float(metrics["entropy/mean"].count) == batch.learn.sum()
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), some, plain)
    assert max(jax.tree.leaves(moved)) > 1e-3 * STEP
