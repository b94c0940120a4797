"""A one-layer model and a ragged rollout of it, small enough that compiling is all the cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.models.config import ModelConfig, RuntimeConfig
from gtalign_jax.models.transformer import init_params
from gtalign_jax.types import Completions, PromptBatch, Rollout

PROMPTS, GROUP, WIDTH, SLOTS = 8, 2, 4, 3


@pytest.fixture(scope="session")
def model():
    return ModelConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        runtime=RuntimeConfig(scan_layers=False),
        initializer_range=0.3,
    )


@pytest.fixture(scope="session")
def params(model):
    return jax.jit(init_params, static_argnums=1)(jax.random.key(0), model)


@pytest.fixture(scope="session")
def reference(model):
    return jax.jit(init_params, static_argnums=1)(jax.random.key(1), model)


@pytest.fixture(scope="session")
def rollout():
    """Random tokens; rows of 1 to 4 tokens, some of them cut short; the sampler's logprobs are made up."""
    rng = np.random.default_rng(0)
    shape = (PROMPTS, GROUP)
    length = rng.integers(1, WIDTH + 1, size=shape)
    finished = rng.random(shape) > 0.3
    mask = np.arange(WIDTH) < length[..., None]
    prompts = PromptBatch(
        tokens=jnp.asarray(rng.integers(0, 13, size=(PROMPTS, SLOTS)), jnp.int32),
        length=jnp.asarray(rng.integers(1, SLOTS + 1, size=PROMPTS), jnp.int32),
    )
    completions = Completions(
        tokens=jnp.asarray(rng.integers(0, 13, size=(*shape, WIDTH)), jnp.int32),
        length=jnp.asarray(length, jnp.int32),
        finished=jnp.asarray(finished),
        logp=jnp.asarray(np.where(mask, -rng.exponential(size=(*shape, WIDTH)), 0.0), jnp.float32),
        action_mask=jnp.asarray(mask),
    )
    return Rollout(prompts, completions)


@pytest.fixture(scope="session")
def reward():
    return jnp.asarray(np.random.default_rng(1).random((PROMPTS, GROUP)), jnp.float32)


@pytest.fixture(scope="session")
def valid():
    """All but one verdict was obtained."""
    return jnp.ones((PROMPTS, GROUP), bool).at[2, 1].set(False)
