"""Evaluating a model on held-out prompts."""

import dataclasses
from typing import Any

import jax

from gtalign_jax import jsonl
from gtalign_jax.mesh import processes
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.generator import generate, hand_over
from gtalign_jax.rollout.request import Request
from gtalign_jax.run.job import Job
from gtalign_jax.run.rollouts import write_rollouts
from gtalign_jax.run.score import rollout_lines, score
from gtalign_jax.types import PyTree


def evaluate(job: Job, params: PyTree, step: int) -> list[dict[str, Any]]:
    """Rollout lines of `samples` completions of every test prompt.

    The random key is the evaluation's own, so every model meets the same draws.
    """
    config = job.settings.evaluate
    sampling = dataclasses.replace(job.settings.sampling, temperature=config.temperature)
    count = min(config.prompts, len(job.test.items))
    buckets = dataclasses.replace(job.settings.buckets, batch=(count,))
    engine = dataclasses.replace(job.engine, sampling=sampling, buckets=buckets)
    lines = []
    hand_over(job.generator, engine, params)
    for first in range(0, len(job.test.items), count):
        items = job.test.items[first : first + count]
        prompts = engine_lib.prompt_batch(engine, job.test.tokens[first : first + count])
        request = Request(
            prompts=prompts,
            key=jax.random.key(config.seed),
            group_size=config.samples,
            max_new_tokens=job.settings.max_new_tokens,
            first_row=first,
        )
        rollout = generate(job.generator, engine, params, request)
        lines += rollout_lines(rollout, score(job, rollout, items), step)
    return lines


def evaluate_once(job: Job, name: str, params: PyTree, step: int) -> list[dict[str, Any]]:
    """The rollout lines of a model's evaluation, from its file when a run before this one made it."""
    path = job.workdir / "rollouts" / f"{name}_{step}.jsonl"
    if not processes.from_main(path.is_file):
        lines = evaluate(job, params, step)
        if processes.is_main():
            write_rollouts(job.workdir, name, step, lines)
    return processes.from_main(lambda: jsonl.read(path))
