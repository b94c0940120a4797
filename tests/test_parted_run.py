"""A tiny alignment in micro-batches by token count: the curve of the whole update, and nothing compiles."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import quickstart
from gtalign_jax import jsonl
from gtalign_jax.align import run_align
from gtalign_jax.errors import UserError
from gtalign_jax.learning import microbatches
from gtalign_jax.run.job import load_start, make_job
from gtalign_jax.run.log import RunLog
from gtalign_jax.run.phase import open_session
from gtalign_jax.train import PHASES
from gtalign_jax.types import Reward

BUDGET = 24


def words(features, config):
    """Rewards that differ: random tokens are no chains, and would leave only rounding to learn from."""
    del config
    value = (features.total_words % 8) / 7
    return Reward(user=value, llm=value, welfare=value, parts={})


@pytest.fixture
def config():
    config = quickstart.get_config("tiny")
    config.max_new_tokens, config.buckets.completion, config.buckets.prompt = BUDGET, (BUDGET,), (96,)
    config.model.num_layers, config.sft.steps = 1, 0
    config.align.update(steps=3, prompts=4, group_size=4, untrained_blocks=())
    config.policy_optimizer.warmup = 1
    config.data.tasks = ("math",)
    config.metrics.tensorboard = False
    return config


def coin(features, config):
    """Rewards of two values, of which a group of four may have one alone."""
    reward = words(features, config)
    value = (features.total_words % 2).astype(reward.welfare.dtype)
    return dataclasses.replace(reward, user=value, llm=value, welfare=value)


def run(config, workdir, reward_fn=words):
    """(metrics of every step, final parameters) with a third of the vocabulary ending a completion."""
    workdir.mkdir()
    job = make_job(config, workdir)
    engine = dataclasses.replace(job.engine, eos_ids=tuple(range(0, job.model.vocab_size, 3)))
    job = dataclasses.replace(job, engine=engine, reward_fn=reward_fn)
    settings = job.settings
    log = RunLog(workdir, PHASES, settings.metrics)
    with open_session(workdir, job.mesh, log, settings.checkpoint, settings.health) as session:
        params = run_align(job, load_start(job), session)
    return jsonl.read(workdir / "metrics.jsonl"), params


def test_a_run_by_parts_is_the_run_of_the_whole(config, tmp_path, monkeypatch):
    """Lengths vary from step to step; every shape is compiled in the first."""
    monkeypatch.setattr(microbatches, "STEPS", (1.0, 0.5))  # two programs to compile
    lines, want = run(config, tmp_path / "whole")
    config.algorithm.microbatch_tokens = 2 * (96 + 4 * BUDGET)
    parted, got = run(config, tmp_path / "parted")
    clock = ("time", "seconds", "tokens_per_s", "compile/programs")
    assert len({line["length/mean"] for line in parted}) > 1
    assert all(line["grad/norm"] > 1e-2 for line in parted)
    for line, other in zip(parted, lines, strict=True):
        numbers = {k: v for k, v in line.items() if k not in clock and isinstance(v, float)}
        assert numbers == pytest.approx({name: other[name] for name in numbers}, rel=1e-3, abs=1e-5)
    assert [line["compile/programs"] for line in parted[1:]] == [0, 0]
    gap = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), got, want)
    assert max(jax.tree.leaves(gap)) < 1e-4


@pytest.mark.parametrize(
    "switches",
    [{"align.overlap": True}, {"algorithm.dynamic_sampling": True}, {"algorithm.scale": "gdpo"}],
    ids=lambda switches: next(iter(switches)),
)
def test_parts_go_with_what_else_changes_a_step(config, tmp_path, monkeypatch, switches):
    """A rollout of the step before, groups drawn again, rewards normalised one by one."""
    monkeypatch.setattr(microbatches, "STEPS", (1.0,))
    config.update_from_flattened_dict(switches)
    config.align.steps = 2
    lines, want = run(config, tmp_path / "whole", coin)
    config.algorithm.microbatch_tokens = 2 * (96 + 4 * BUDGET)
    parted, got = run(config, tmp_path / "parted", coin)
    assert min(line["grad/norm"] for line in parted) > 1e-2
    if config.algorithm.dynamic_sampling:
        assert max(line["group/batches_drawn"] for line in parted) > 1
    for line, other in zip(parted, lines, strict=True):
        assert line["grad/norm"] == pytest.approx(other["grad/norm"], rel=1e-3)
    gap = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), got, want)
    assert max(jax.tree.leaves(gap)) < 1e-4


def test_a_budget_below_one_prompt_is_refused_before_anything_runs(config, tmp_path):
    config.algorithm.microbatch_tokens = 100
    with pytest.raises(UserError, match="microbatch_tokens=100: 1 devices.*96 slots.*take 192; raise it"):
        make_job(config, tmp_path)
