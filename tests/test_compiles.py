"""After warm-up no program is compiled: fifty steps of alignment on prompts and completions of any length."""

import dataclasses

import numpy as np
import pytest

from gtalign_jax import config, jsonl
from gtalign_jax.align import run_align
from gtalign_jax.data import loader
from gtalign_jax.data.loader import PromptSet
from gtalign_jax.run.job import load_start, make_job
from gtalign_jax.run.log import RunLog
from gtalign_jax.run.phase import open_session
from gtalign_jax.train import PHASES

BUCKETS, BUDGET, PROMPTS, GROUP, STEPS = (16, 96), 12, 2, 4, 51
FLAGS = [
    f"--config.buckets.prompt={BUCKETS}",
    f"--config.buckets.completion=({BUDGET},)",
    f"--config.buckets.batch=({PROMPTS},)",
    f"--config.max_new_tokens={BUDGET}",
    "--config.sft.steps=0",
    f"--config.align.steps={STEPS}",
    f"--config.align.prompts={PROMPTS}",
    f"--config.align.group_size={GROUP}",
    "--config.align.dump_every=20",
    "--config.align.untrained_blocks=()",
    "--config.algorithm.kl_coef=0.0",  # no reference: one forward pass less to compile for each bucket
    "--config.model.num_layers=1",
    "--config.checkpoint.every=25",
    "--config.metrics.tensorboard=False",
]


@pytest.fixture
def job(tmp_path):
    """The tiny job with ragged prompts and an engine that compacts; a quarter of its tokens end a row."""
    command = ["prog", "--config=configs/quickstart.py:tiny", *FLAGS, "--workdir=x"]
    job = make_job(config.parse_command(command, {"workdir": ""})[0], tmp_path)
    vocab, items = job.model.vocab_size, job.train.items
    rng = np.random.default_rng(0)
    longest = rng.choice(BUCKETS, len(items), p=(0.7, 0.3))  # the longer of two decides the bucket
    tokens = [rng.integers(1, vocab, rng.integers(1, n + 1)).tolist() for n in longest]
    engine = dataclasses.replace(job.engine, compact_every=2, eos_ids=tuple(range(0, vocab, 4)))
    return dataclasses.replace(job, engine=engine, train=PromptSet(items, tokens, 0))


def bucket_of(job, k):
    """The prompt bucket of step k."""
    rows = loader.step_rows(len(job.train.items), PROMPTS, job.settings.data.seed, k)
    longest = max(len(job.train.tokens[i]) for i in rows)
    return min(size for size in BUCKETS if size >= longest)


def test_nothing_is_compiled_in_fifty_steps_of_mixed_lengths(job):
    """Sampling with compaction, scoring, experience, update and saves: all is compiled before the first step,
    for the bucket that is first met later too, whatever the lengths."""
    settings, start = job.settings, load_start(job)
    log = RunLog(job.workdir, PHASES, settings.metrics)
    with open_session(job.workdir, job.mesh, log, settings.checkpoint, settings.health) as session:
        run_align(job, start, session)
    lines = jsonl.read(job.workdir / "metrics.jsonl")
    assert {bucket_of(job, k) for k in range(1, STEPS)} > {bucket_of(job, 0)}
    assert len({line["length/mean"] for line in lines}) > 20
    compiled = [line["compile/programs"] for line in lines]
    assert compiled[0] > 0, "the counter hears compilations"
    assert compiled[1:] == [0] * 50
