"""What the cold start has taught, told after every epoch: how well held-out chains are expected, and whether
the model writes whole chains by itself."""

import functools
from collections.abc import Iterator

import jax
import numpy as np

from gtalign_jax.evaluation.heldout import evaluation_engine
from gtalign_jax.learning.sft import mean_loss
from gtalign_jax.mesh import processes
from gtalign_jax.mesh.memory import EVALUATION, Purpose, compile_to_fit, told
from gtalign_jax.rewards import reading
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.generator import Shape, compile_largest, fitting, generate, hand_over
from gtalign_jax.rollout.request import Request
from gtalign_jax.run.job import Job
from gtalign_jax.run.lessons import held_out_batches
from gtalign_jax.run.phase import Metrics
from gtalign_jax.run.progress import stage
from gtalign_jax.types import PyTree

HELD_OUT = Purpose("held-out chains", "lower config.sft.prompts, or split more with config.mesh")


def compile_lessons(job: Job, params: PyTree) -> None:
    """Have all programs of `learnt` compiled. UserError for one that does not fit in memory."""
    size = job.settings.sft.prompts
    for batch in held_out_batches(job):  # of a shape that was compiled before, nothing is compiled
        lowered = mean_loss.lower(params, processes.global_batch(batch, size, job.mesh), model=job.model)
        compile_to_fit(lowered, HELD_OUT)
    engine, count = evaluation_engine(job)
    widths = {request.prompts.tokens.shape[1] for request in _requests(job, engine, count)}
    for width in sorted(widths):
        shape = Shape(count, width, 1, job.settings.max_new_tokens)
        compile_largest(fitting(EVALUATION), job.generator, engine, params, shape)


def learnt(job: Job, params: PyTree, step: int) -> Metrics:
    """`sft/perplexity` of the held-out chains and `sft/format`, the share of whole chains with a readable
    matrix among those that the model writes to their prompts."""
    size, total, tokens = job.settings.sft.prompts, 0.0, 0.0
    engine, count = evaluation_engine(job)
    with stage(f"sft step {step}: {len(job.held_out)} held-out chains"), told(EVALUATION):
        for batch in held_out_batches(job):
            loss = mean_loss(params, processes.global_batch(batch, size, job.mesh), model=job.model)
            total, tokens = total + float(loss.total), tokens + float(loss.count)
        hand_over(job.generator, engine, params)
        whole: list[bool] = []
        for request in _requests(job, engine, count):
            written = generate(job.generator, engine, params, request)
            whole += map(functools.partial(_is_whole, job), engine_lib.texts(engine, written.completions))
    return {"sft/perplexity": float(np.exp(total / tokens)), "sft/format": float(np.mean(whole))}


def _requests(job: Job, engine: Engine, count: int) -> Iterator[Request]:
    """One completion of every held-out prompt, `count` prompts at a time."""
    for first in range(0, len(job.held_out), count):
        prompts = [row.prompt for row in job.held_out[first : first + count]]
        yield Request(
            prompts=engine_lib.prompt_batch(engine, prompts),
            key=jax.random.key(job.settings.evaluate.seed),
            group_size=1,
            max_new_tokens=job.settings.max_new_tokens,
            first_row=first,
        )


def _is_whole(job: Job, text: str) -> bool:
    features = job.settings.features
    if features.plain:
        return reading.read_plain(text).chain.format_ok
    chain = reading.read(text, features.code_fences).chain
    return chain.format_ok and chain.row is not None
