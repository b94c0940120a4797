"""Configs for pods: the published sizes of their models, and the paper's numbers."""

import importlib

import jax
import numpy as np
import pytest

from gtalign_jax.errors import UserError
from gtalign_jax.models import hf
from gtalign_jax.models.config import from_hf, to_hf
from gtalign_jax.planning.plan import architecture
from gtalign_jax.run.settings import check_batches, make_settings

# Parameters of the published checkpoints (the hub's safetensors totals), and chips of the intended slices.
PUBLISHED = {
    "qwen2_5_0_5b": (494_032_768, (8,)),
    "qwen2_5_3b.full": (3_085_938_688, (16, 256)),
    "qwen2_5_7b": (7_615_616_512, (64,)),
    "qwen2_5_32b": (32_763_876_352, (64,)),
    "qwen3_8b": (8_190_735_360, (64,)),
    "llama3_8b": (8_030_261_248, (64,)),
}
TASKS = ("math", "medium", "ambig_qa", "wildguard")


def load(name, *variant):
    config = importlib.import_module(f"configs.{name}").get_config(*variant)
    return config, make_settings(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_architectures_have_the_published_number_of_parameters(name):
    config, settings = load(name)
    shapes = hf.abstract_params(architecture(config, settings))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name][0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_architectures_survive_hugging_face_json(name):
    config, settings = load(name)
    model = architecture(config, settings)
    again = from_hf(to_hf(model))
    for field in (
        "rope",
        "rms_norm_eps",
        "qkv_bias",
        "qk_norm",
        "tie_embeddings",
        "head_dim",
        "num_kv_heads",
    ):
        assert getattr(again, field) == getattr(model, field), field


@pytest.mark.parametrize("name", PUBLISHED)
def test_batches_divide_over_the_intended_slices(name):
    _, settings = load(name)
    for chips in PUBLISHED[name][1]:
        data, fsdp, tensor, context = settings.mesh.shape(chips)
        assert data * fsdp * tensor * context == chips
        check_batches(settings, data * fsdp)


@pytest.mark.parametrize("name", PUBLISHED)
def test_pods_decode_from_gathered_weights(name):
    assert architecture(*load(name)).runtime.decode_layout == "gathered"


def test_a_batch_that_does_not_divide_is_refused():
    config, _ = load("qwen2_5_3b.full")
    config.align.update(prompts=100, rollout_prompts=0)
    with pytest.raises(UserError, match="config.align.prompts=100: must be a multiple of 32"):
        check_batches(make_settings(config), 8)


@pytest.mark.parametrize("task", [*TASKS, "full"])
def test_the_papers_hyper_parameters(task):
    _, s = load(f"qwen2_5_3b.{task}")
    assert (s.policy_optimizer.lr, s.critic_optimizer.lr, s.sft_optimizer.lr) == (1e-6, 2e-6, 1e-6)
    assert (s.align.prompts, s.align.group_size, s.align.steps) == (512, 1, 150)
    assert s.align.prompts // s.algorithm.minibatches == 32
    assert (s.sft.prompts * s.sft.chains, s.sft.steps) == (64, 844)
    assert (s.algorithm.gamma, s.algorithm.lam, s.algorithm.epochs, s.sampling.temperature) == (1, 1, 1, 1)
    assert (s.algorithm.clip_low, s.algorithm.clip_high, s.algorithm.value_clip) == (0.2, 0.2, 0.5)
    budget = (2048, 4096) if task == "full" else (8192, 8192)
    assert (s.buckets.prompt[-1], s.max_new_tokens) == budget
    assert s.data.tasks == (TASKS if task == "full" else (task,))
    assert s.align.normalize == ("zscore" if task == "full" else "none")


def test_a_larger_model_takes_its_task_from_the_variant():
    assert load("qwen2_5_7b", "math")[1].data.tasks == ("math",)
    with pytest.raises(UserError, match="variant 'chess'"):
        load("qwen2_5_7b", "chess")
