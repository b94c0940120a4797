"""The decode layouts are one function: same tokens, same log-probabilities, chosen in one place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, place_batch, shard_tree
from gtalign_jax.models import layouts
from gtalign_jax.models.config import ModelConfig, RuntimeConfig
from gtalign_jax.models.transformer import forward_shared, init_params, logical_axes, unembed
from gtalign_jax.rollout import decode
from gtalign_jax.rollout.request import Ending, Placed, Rules
from gtalign_jax.rollout.sampling import GREEDY, SamplingConfig
from gtalign_jax.types import PromptBatch

CONFIG = ModelConfig(
    vocab_size=150,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=1,
    head_dim=8,
    initializer_range=0.3,
    tie_embeddings=False,
    output_bias=True,
    qk_norm=True,
    window=6,
    window_layers=(True, False),
    runtime=RuntimeConfig(decode_layout="features"),
)
ROWS = dataclasses.replace(CONFIG, runtime=RuntimeConfig(decode_layout="rows"))
NEVER = Rules(Ending(np.array([-1], np.int32)))


@functools.cache
def params():
    made = jax.jit(init_params, static_argnums=1)(jax.random.key(0), CONFIG)
    # Biases of zero and scales of one would hide a missing one.
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), made)


def prompts() -> PromptBatch:
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 9)).astype(np.int32)
    return PromptBatch(jnp.asarray(tokens), jnp.asarray([9, 1, 5]))


def placed(batch: PromptBatch) -> Placed:
    return Placed(batch, jax.random.key(1), group_size=2, slots=10)


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def generated(params, config, sampling, key=None):
    return decode.generate(params, config, placed(prompts()), sampling, NEVER).completions


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=0.9)])
def test_both_layouts_write_the_same_and_agree_with_the_trainer(sampling):
    ours = generated(params(), CONFIG, sampling)
    plain = generated(params(), ROWS, sampling)
    np.testing.assert_array_equal(ours.tokens, plain.tokens)
    np.testing.assert_allclose(ours.logp, plain.logp, atol=1e-5)
    batch = prompts()
    hidden = forward_shared(params(), CONFIG, batch.tokens, batch.length, ours.tokens)
    logp = jax.nn.log_softmax(unembed(params(), CONFIG, hidden) / (sampling.temperature or 1.0))
    expected = np.take_along_axis(np.asarray(logp), np.asarray(ours.tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(ours.logp, expected, atol=1e-5)


def test_half_precision_is_as_close_to_float32_as_the_plain_layout():
    exact = generated(params(), ROWS, GREEDY)
    errors = []
    for config in (CONFIG, ROWS):
        runtime = dataclasses.replace(config.runtime, compute_dtype="bfloat16")
        low = dataclasses.replace(config, runtime=runtime)
        made = generated(params(), low, GREEDY)
        errors.append(np.abs(made.logp - exact.logp)[..., 0].max())
    assert errors[0] < 2 * errors[1] + 0.02


def test_prepared_weights_go_on_from_a_start_with_plain_ones():
    whole = generated(params(), CONFIG, GREEDY)
    weights = jax.jit(layouts.prepare_decode, static_argnums=1)(params(), CONFIG)
    state = decode.start(params(), CONFIG, placed(prompts()), GREEDY, NEVER)
    advance = jax.jit(decode.advance, static_argnums=(1, 3))
    for until in (4, 10):
        state = advance(weights, CONFIG, state, GREEDY, NEVER, until=until)
    np.testing.assert_array_equal(state.completions.tokens, whole.tokens)


def test_auto_is_features_on_one_cpu_and_rows_on_a_mesh_or_with_lora_factors():
    auto = dataclasses.replace(CONFIG, runtime=RuntimeConfig(decode_layout="auto"))
    assert layouts.feature_major(params(), auto)
    assert not layouts.feature_major(params(), ROWS)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        assert not layouts.feature_major(params(), auto)
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert layouts.feature_major(params(), auto)
    layers = params()["layers"]
    factors = {**layers["query"], "lora_a": jnp.zeros((2, 24, 3)), "lora_b": jnp.zeros((2, 3, 4, 8))}
    adapted = {**params(), "layers": {**layers, "query": factors}}
    assert not layouts.feature_major(adapted, CONFIG)


def test_an_unknown_layout_is_named():
    with pytest.raises(ValueError, match="^decode_layout='columns'"):
        RuntimeConfig(decode_layout="columns")


def test_weights_gathered_before_the_loop_write_what_one_device_writes():
    sampling = SamplingConfig(temperature=0.9)
    gathered = RuntimeConfig(decode_layout="gathered")
    config = dataclasses.replace(CONFIG, runtime=gathered, num_kv_heads=2)
    made = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), prompts())
    run = jax.jit(decode.generate, static_argnames=("config", "sampling"))
    rows = dataclasses.replace(config, runtime=ROWS.runtime)
    expected = run(made, rows, placed(batch), sampling, NEVER).completions
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))
    spread = jax.device_put(made, shard_tree(logical_axes(config), mesh, made))
    with jax.set_mesh(mesh):
        ours = run(spread, config, placed(place_batch(batch, mesh)), sampling, NEVER).completions
    np.testing.assert_array_equal(ours.tokens, expected.tokens)
    np.testing.assert_allclose(ours.logp, expected.logp, atol=1e-5)
