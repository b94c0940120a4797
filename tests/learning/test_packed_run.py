"""A cold start on packed rows: counted, compiled once, resumed to the bit."""

import shutil

import jax
import numpy as np
import pytest

from configs import quickstart
from gtalign_jax import jsonl
from gtalign_jax.data.loader import Demonstration
from gtalign_jax.errors import UserError
from gtalign_jax.run.adapters import add_adapters
from gtalign_jax.run.epochs import divided, epoch_ends, packed_stream, with_steps
from gtalign_jax.run.export import export_checkpoint
from gtalign_jax.run.job import load_start, make_job
from gtalign_jax.run.log import RunLog
from gtalign_jax.run.phase import open_session
from gtalign_jax.run.record import write_config
from gtalign_jax.run.settings import SftConfig, make_settings
from gtalign_jax.train import PHASES, run_sft


def run(config, workdir):
    """The parameters after the cold start, on the host."""
    job = make_job(config, workdir)
    settings = job.settings
    log = RunLog(workdir, PHASES, settings.metrics)
    with open_session(workdir, job.mesh, log, settings.checkpoint, settings.health) as session:
        start = add_adapters(job, load_start(job))
        return jax.device_get(run_sft(job, start, session))


def test_a_run_counts_chains_compiles_once_and_resumes(tmp_path):
    config = quickstart.get_config("tiny")
    config.model.num_layers, config.align.steps, config.metrics.tensorboard = 1, 0, False
    config.sft.update(steps=3, prompts=2, chains=1, pack=640)
    config.data.tasks = ("math",)
    config.checkpoint.update(every=1, keep=3)
    want = run(config, tmp_path)
    lines = jsonl.read(tmp_path / "metrics.jsonl")
    assert all(line["chains"] > 2 for line in lines)
    assert [line["compile/programs"] for line in lines[1:]] == [0, 0]
    for step in (2, 3):
        shutil.rmtree(tmp_path / "checkpoints" / "sft" / str(step))
    jax.tree.map(np.testing.assert_array_equal, run(config, tmp_path), want)
    assert [line["chains"] for line in jsonl.read(tmp_path / "metrics.jsonl")] == [x["chains"] for x in lines]


def test_a_length_below_zero_is_refused():
    with pytest.raises(ValueError, match="^pack=-1"):
        SftConfig(pack=-1)


@pytest.mark.parametrize("pack", [0, 200])
def test_epochs_over_a_file_of_chains_tell_what_was_learnt(tmp_path, pack):
    """Adapters learn chains of a file, a block weighs more, and what is held out is asked after epochs."""
    config = quickstart.get_config("tiny")
    config.model.num_layers, config.align.steps, config.metrics.tensorboard = 1, 0, False
    config.data.tasks, config.lora.rank, config.max_new_tokens = ("math",), 2, 96
    config.buckets.completion = (96,)
    config.sft_optimizer.update(schedule="cosine", warmup=1)
    chain = "<thinking>t</thinking>\n<payoff>p</payoff>\n<analyze>a</analyze>\n<response>{}</response>"
    lines = ({"question": f"How much is {n}?", "chain": chain.format(n)} for n in range(7))
    jsonl.write(tmp_path / "chains.jsonl", lines)
    config.sft.update(prompts=2, epochs=2, held_out=3, pack=pack, steps=0)
    config.sft.update(demonstrations=str(tmp_path / "chains.jsonl"), block_weights=(0.0, 1.0, 1.0, 4.0))
    write_config(config, tmp_path / "run")
    run(config, tmp_path / "run")
    found = jsonl.read(tmp_path / "run" / "metrics.jsonl")
    told = [line for line in found if "sft/perplexity" in line]
    asked = [line["step"] for line in told]
    assert asked[-1] == len(found) - 1 and len(asked) == 2
    assert [line["compile/programs"] for line in found[1:]] == [0] * (len(found) - 1)
    assert all(line["sft/perplexity"] > 1 and 0 <= line["sft/format"] <= 1 for line in told)
    if not pack:
        assert len(found) == 4 and asked == [1, 3]  # four chains to train on, two a step
    said = export_checkpoint(tmp_path / "run" / "checkpoints", tmp_path / "hf")
    assert said == f"sft step {len(found)}" and (tmp_path / "hf" / "model.safetensors").is_file()


def test_an_epoch_ends_once_each_chain_was_trained_on():
    config = quickstart.get_config("tiny")
    config.sft.update(prompts=4, pack=0)
    data = [Demonstration([1] * 3, [[2] * 5, [3] * 4]) for _ in range(10)]
    ends = epoch_ends(make_settings(config), data)
    assert [next(ends) for _ in range(4)] == [3, 5, 8, 10]
    config.sft.update(prompts=2, pack=17, epochs=3)
    settings = with_steps(make_settings(config), data)
    stream, seen = packed_stream(settings, data), []
    for k in range(settings.sft.steps):
        seen.append(stream.batch(k).chains)
    assert sum(seen[:-1]) < 3 * 20 <= sum(seen)


def test_what_is_held_out_is_not_trained_on():
    config = quickstart.get_config("tiny")
    config.sft.held_out = 3
    data = [Demonstration([n], [[n]]) for n in range(10)]
    train, held = divided(data, make_settings(config))
    assert len(held) == 3 and sorted(row.prompt[0] for row in (*train, *held)) == list(range(10))
    assert divided(data, make_settings(config))[1] == held
    config.sft.held_out = 10
    with pytest.raises(UserError, match="config.sft.held_out=10: there are 10 demonstrations"):
        divided(data, make_settings(config))


@pytest.mark.parametrize("weights", [(1.0,), (0.0,) * 4, (1.0, -1.0, 1.0, 1.0), (1.0, 1.0, 1.0, "x")])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="^block_weights="):
        SftConfig(block_weights=weights)
