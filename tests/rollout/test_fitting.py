"""What generation takes is known before any of it runs, whoever decodes how."""

import dataclasses

import jax
import numpy as np
import pytest

from gtalign_jax.errors import UserError
from gtalign_jax.mesh import memory
from gtalign_jax.models import hf
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.transformer import init_params
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generate, generator
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.generator import Generator, Shape
from gtalign_jax.rollout.request import Request
from gtalign_jax.run.compiles import counting_compiles

MODEL = ModelConfig(
    vocab_size=304, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=1
)
SHAPE = Shape(prompts=4, slots=8, group_size=2, max_new_tokens=12)
OURS = Generator(generate.rollout, None, None, None)
WAYS = {"at once": {}, "compacted": {"compact_every": 2}, "queued": {"rows": 6}}


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=1)(jax.random.key(0), MODEL)


@pytest.fixture
def engine(tokenizer) -> Engine:
    return Engine(tokenizer, MODEL, (1,), buckets=BucketConfig(prompt=(8,), completion=(12,)))


@pytest.mark.parametrize("way", WAYS)
def test_all_of_a_generation_is_measured_from_shapes_before_any_runs(engine, way):
    """Each program with the arguments that are not there yet, parameters among them."""
    engine, found = dataclasses.replace(engine, **WAYS[way]), []

    def compiling(lowered, beside):
        found.append(beside)
        return lowered.compile()

    shapes = hf.abstract_params(MODEL)
    generator.compile_largest(compiling, OURS, engine, shapes, SHAPE)
    weights = memory.device_bytes(shapes)
    assert weights > 4 * 304 * 32 and min(found) >= weights
    # Caches [P, S, K, H] and [P, G, N, K, H] are arguments where decoding is a program of its own.
    held = 4 * 2 * MODEL.head_dim * (4 * 8 + 4 * 2 * 12)
    assert max(found) >= weights + held if way == "compacted" else len(found) in (1, 4)


@pytest.mark.parametrize("way", WAYS)
def test_a_generation_that_does_not_fit_is_refused_before_it_runs(engine, params, way, monkeypatch):
    engine = dataclasses.replace(engine, **WAYS[way])
    monkeypatch.setattr(memory, "free_bytes", lambda: 100)
    monkeypatch.setattr(generate, "_run", None)
    with pytest.raises(UserError, match=r"^out of memory: generation needs .*; lower config.align") as caught:
        generator.warm_up(OURS, engine, params, SHAPE)
    assert "\n" not in str(caught.value)


def test_what_was_measured_is_what_runs(engine, params):
    """The program that was compiled to be measured, from shapes alone, is not compiled again."""
    prompts = engine_lib.prompt_batch(engine, [[3, 4, 5]] * SHAPE.prompts)
    request, shape = Request(prompts, jax.random.key(3), 3, 12), SHAPE._replace(group_size=3)
    with counting_compiles() as compiled:
        generator.compile_largest(
            generator.fitting(memory.EVALUATION), OURS, engine, hf.abstract_params(MODEL), shape
        )
        assert compiled.take() == 1
        made = generator.generate(OURS, engine, params, request)
        assert compiled.take() == 0
    assert np.asarray(made.completions.length).shape == (4, 3)
