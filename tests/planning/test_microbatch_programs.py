"""The plan of learning in micro-batches by token count: the trainer's programs and their calls."""

import dataclasses
import math

import jax
import pytest

from configs import quickstart
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.planning.microbatches import microbatch_programs
from gtalign_jax.planning.programs import abstract_batch, planned_learner, planned_state
from gtalign_jax.run.settings import make_settings

MODEL = ModelConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8
)


@pytest.fixture(scope="module")
def found():
    config = quickstart.get_config()
    config.max_new_tokens, config.buckets.prompt, config.buckets.completion = 8, (16,), (8,)
    config.align.update(algorithm="ppo", prompts=32, group_size=2)
    # 4 devices of 2 prompts of 16 + 2 * 8 slots: 2 micro-batches in each of 2 mini-batches, twice.
    config.algorithm.update(minibatches=2, epochs=2, microbatch_tokens=8 * 32)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    settings = make_settings(config)
    learner = planned_learner(settings, MODEL)
    return {program.name: program for program in microbatch_programs(settings, learner, mesh)}


def test_every_program_with_its_calls_and_tokens(found):
    calls = {name: program.calls for name, program in found.items()}
    assert calls == {
        "experience part": 4,
        "policy part": 8,
        "policy step": 4,
        "critic part": 8,
        "critic step": 4,
    }
    assert {found[name].tokens for name in calls if "part" in name} == {8 * 32}


def test_the_gradient_goes_in_and_comes_out_split_as_the_parameters(found):
    """And takes no room of its own: the sums are donated."""
    program = found["policy part"]
    compiled = program.lower().compile()
    sums, params = program.args[1], program.args[5]
    out_shardings = jax.tree.leaves(compiled.output_shardings.grads)
    for leaf, out in zip(jax.tree.leaves(params), out_shardings, strict=True):
        assert out.is_equivalent_to(leaf.sharding, leaf.ndim)
    sizes = (math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(sums.grads))
    held = 4 * sum(sizes)
    assert compiled.memory_analysis().alias_size_in_bytes >= held


def test_the_plan_is_of_the_program_that_runs():
    """The grammar's limit, blocks that earn no advantage, a rollout one update old; nothing that waits."""
    config = quickstart.get_config()
    config.align.update(overlap=True, untrained_blocks=("analyze",))
    config.engine.grammar = True
    settings, mesh = make_settings(config), make_mesh(MeshConfig())
    learner = planned_learner(settings, dataclasses.replace(MODEL, vocab_size=300))
    assert learner.spec.limit is not None and learner.spec.old_from_sampler
    assert abstract_batch(settings, mesh).untrained.shape == (16, 8, 144)
    assert planned_state(settings, learner, mesh).waiting is None
    config.align.update(overlap=False, untrained_blocks=())
    config.engine.grammar = False
    settings = make_settings(config)
    learner = planned_learner(settings, MODEL)
    assert learner.spec.limit is None and not learner.spec.old_from_sampler
    assert abstract_batch(settings, mesh).untrained is None
