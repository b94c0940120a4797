"""A cold start on packed rows: counted, compiled once, resumed to the bit."""

import shutil

import jax
import numpy as np
import pytest

from configs import quickstart
from gtalign_jax import jsonl
from gtalign_jax.run.job import load_start, make_job
from gtalign_jax.run.log import RunLog
from gtalign_jax.run.phase import open_session
from gtalign_jax.run.settings import SftConfig
from gtalign_jax.train import PHASES, run_sft


def run(config, workdir):
    """The parameters after the cold start, on the host."""
    job = make_job(config, workdir)
    settings = job.settings
    log = RunLog(workdir, PHASES, settings.metrics)
    with open_session(workdir, job.mesh, log, settings.checkpoint, settings.health) as session:
        return jax.device_get(run_sft(job, load_start(job), session))


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
