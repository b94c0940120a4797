"""A tiny run that trains adapters, from the config to the files others load; cut off and gone on with."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from configs import quickstart
from experiments.check_kills import digests, steps
from gtalign_jax import jsonl
from gtalign_jax.models import hf, transformer
from gtalign_jax.models.config import read_config
from gtalign_jax.run.export import export_checkpoint
from gtalign_jax.run.settings import StartConfig
from gtalign_jax.train import train


@pytest.fixture(scope="module")
def config():
    config = quickstart.get_config("tiny")
    config.seed = 1  # by which the first checkpoint is the best
    config.lora.update(rank=2, alpha=8.0, targets=("query", "value", "output", "up"))
    config.model.update(num_layers=1, initializer_range=0.3)
    config.start.update(param_dtype="bfloat16", scan_layers=True)
    config.max_new_tokens, config.buckets.completion = 112, (112,)
    config.data.update(train_per_task=8, test_per_task=1, tasks=("math", "wildguard"))
    config.sft.update(steps=2, prompts=2)
    config.sft_optimizer.lr = 0.1
    config.align.update(steps=2, prompts=2, group_size=2)
    config.policy_optimizer.update(lr=0.05, warmup=0)
    config.evaluate.update(samples=2, prompts=2)  # the shape of a rollout: one program serves both
    config.steer.tries = 0
    config.checkpoint.update(every=1, keep_best=1, best="entropy/mean")
    return config


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(config, workdir)
    return workdir


def test_a_run_that_was_cut_off_ends_with_the_same_bytes(run, config, tmp_path):
    """As it was after the first alignment step: no second checkpoint and nothing that came after it."""
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for name in ("checkpoints/align/2", "hf", "adapter"):
        shutil.rmtree(again / name)
    (again / "rollouts" / "aligned_2.jsonl").unlink()
    train(config, again)
    names = ("hf", "rollouts", "adapter/adapter_model.safetensors", "summary.json")
    assert digests(again, names) == digests(run, names)
    assert set(names[2:]) < set(digests(run, names))
    assert steps(again) == steps(run)


def test_exporting_the_checkpoints_gives_model_and_adapter(run, tmp_path):
    assert export_checkpoint(run / "checkpoints", tmp_path / "hf") == "align step 2"
    assert digests(tmp_path, ["hf"]) == digests(run, ["hf"])
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "hf_adapter" / name).read_bytes() == (run / "adapter" / name).read_bytes()


def test_the_best_checkpoint_is_exported_on_request(run, tmp_path):
    lines = [line for line in jsonl.read(run / "metrics.jsonl") if line["phase"] == "align"]
    best = max(lines, key=lambda line: line["entropy/mean"])
    assert best["step"] < lines[-1]["step"]
    assert (
        export_checkpoint(run / "checkpoints", tmp_path / "hf", best=True) == f"align step {best['step'] + 1}"
    )
    assert digests(tmp_path, ["hf"]) != digests(run, ["hf"])


def test_the_exported_model_gives_our_logits_in_pytorch_and_is_no_longer_the_base(run):
    tokens = np.random.default_rng(0).integers(0, 300, (2, 9))
    config = read_config(run / "hf")
    params = hf.load_params(run / "hf", config)
    hidden = transformer.forward(params, config, jnp.asarray(tokens, jnp.int32), jnp.array([9, 9], jnp.int32))
    ours = np.asarray(transformer.unembed(params, config, hidden))
    logits = {}
    for name in ("hf", "init"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(run / name, dtype=torch.float32).eval()
        with torch.no_grad():
            logits[name] = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, logits["hf"], atol=1e-4)
    assert np.abs(logits["hf"] - logits["init"]).max() > 0.05


def test_checkpoints_hold_adapters_only(run):
    size = sum(
        path.stat().st_size for path in (run / "checkpoints" / "align" / "2").rglob("*") if path.is_file()
    )
    weights = (run / "init" / "model.safetensors").stat().st_size
    assert size < weights, (size, weights)


def test_an_unknown_type_of_weights_is_refused():
    with pytest.raises(ValueError, match="^param_dtype='int8': must be float32 or bfloat16"):
        StartConfig(param_dtype="int8")
    assert StartConfig().runtime.param_dtype == "float32"  # whatever type the weights are stored in
    assert StartConfig(param_dtype="bfloat16").runtime.param_dtype == "bfloat16"
