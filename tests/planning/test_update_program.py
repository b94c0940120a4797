"""The compiled update on an FSDP x TP mesh: which collectives it has, and that nothing large is copied."""

import math

import jax
import pytest

from configs import quickstart
from gtalign_jax.learning.vocabulary import CHUNK
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh
from gtalign_jax.models import hf
from gtalign_jax.models.config import ModelConfig, RuntimeConfig
from gtalign_jax.planning import cost, hlo, programs
from gtalign_jax.run.settings import make_settings

FSDP, TENSOR = 4, 2
MINIBATCHES, PROMPTS, TOKENS = 2, 16, 800
MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    runtime=RuntimeConfig(remat="full"),
)


@pytest.fixture(scope="module")
def update():
    config = quickstart.get_config()
    config.max_new_tokens, config.buckets.prompt, config.buckets.completion = TOKENS, (16,), (TOKENS,)
    config.align.update(algorithm="ppo_paper", prompts=PROMPTS, group_size=1)
    config.algorithm.minibatches = MINIBATCHES
    settings = make_settings(config)
    mesh = make_mesh(MeshConfig(fsdp=FSDP, tensor=TENSOR))
    learner = programs.planned_learner(settings, MODEL)
    state = programs.planned_state(settings, learner, mesh)
    experience = programs.experience_call(settings, learner, mesh, state, ())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), experience.traced.out_info)
    seen = programs.by_prompt(shapes, mesh)
    compiled = programs.update_call(settings, learner, mesh, state, seen, ()).lower().compile()
    return state, compiled, cost.collectives(hlo.parse(compiled.as_text()))


def leaves(tree):
    return [x for x in jax.tree.leaves(tree) if getattr(x, "size", 0) >= 1024]


def test_parameters_and_moments_go_in_and_come_out_split_over_every_device(update):
    state, compiled, _ = update
    given, returned = compiled.input_shardings[0][0], compiled.output_shardings[0]
    structure = jax.tree.structure(state)
    checked = 0
    for leaf, before, after in zip(
        jax.tree.leaves(state), structure.flatten_up_to(given), structure.flatten_up_to(returned), strict=True
    ):
        assert before.is_equivalent_to(after, leaf.ndim), (leaf.shape, before, after)
        if leaf.ndim and math.prod(leaf.shape) >= 1024:
            checked += 1
            assert math.prod(after.shard_shape(leaf.shape)) * FSDP * TENSOR == math.prod(leaf.shape), (
                leaf.shape
            )
    assert checked >= 2 * 3 * 8  # two models, each with parameters and two moments


def test_memory_holds_the_state_once(update):
    state, compiled, _ = update
    stats = compiled.memory_analysis()
    split = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves(state))
    assert stats.alias_size_in_bytes >= split
    assert stats.output_size_in_bytes - stats.alias_size_in_bytes < 0.05 * split


def test_layers_are_gathered_one_at_a_time_inside_the_layer_loop(update):
    *_, found = update
    stacked = {x.shape for x in jax.tree.leaves(hf.abstract_params(MODEL)["layers"])}
    gathers = [c for c in found if c.kind == "all-gather"]
    assert gathers
    layer_bytes = max(math.prod(s[1:]) * 4 for s in stacked) / TENSOR
    weights = [c for c in gathers if "Block" in c.where]
    assert weights and all(c.times >= MODEL.num_layers for c in weights)
    for item in gathers:
        assert item.shape not in stacked, item
        assert item.times > 1, item
    assert max(c.bytes for c in weights) <= 1.01 * layer_bytes


def test_the_vocabulary_table_is_gathered_and_its_gradient_summed_once_a_pass(update):
    """However many chunks of tokens are scored: one gather forward, one backward, one sum of the gradient."""
    _, compiled, found = update
    chunks = -(-PROMPTS * TOKENS // MINIBATCHES // FSDP // CHUNK)
    assert chunks > 1
    table = (MODEL.vocab_size // TENSOR, MODEL.hidden_size)
    whole = [c for c in found if c.shape in (table, (1, *table)) and c.group == FSDP]
    gathers = sum(c.times for c in whole if c.kind == "all-gather")
    assert MINIBATCHES <= gathers <= 2 * MINIBATCHES  # the critic scores no tokens
    # The policy's scores and lookups, the critic's lookups: prompts and completions.
    sums = [c for c in whole if c.kind in ("all-reduce", "reduce-scatter")]
    assert all(c.times == MINIBATCHES for c in sums) and len(sums) <= 5, sums
    carried = f"f32[1,{table[0]},{table[1]}]"
    assert carried in compiled.as_text()  # what the loop over chunks adds to is one device's part


def test_no_collective_is_larger_than_one_layer_or_the_embedding(update):
    *_, found = update
    layer = 4 * MODEL.hidden_size * MODEL.intermediate_size / TENSOR
    table = 4 * MODEL.vocab_size * MODEL.hidden_size / TENSOR
    activations = 4 * PROMPTS // MINIBATCHES // FSDP * (TOKENS + 16) * MODEL.hidden_size
    # Of one array: the compiler sends several small ones together.
    assert max(4 * math.prod(c.shape) for c in found) <= max(layer, table, activations)


def test_tensor_and_fsdp_groups_both_take_part(update):
    *_, found = update
    assert {c.group for c in found if c.kind != "collective-permute"} >= {FSDP, TENSOR}
