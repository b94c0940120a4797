"""What the steps of the cold start train on: batches as functions of the step, and those held out."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from gtalign_jax.data import loader
from gtalign_jax.data.loader import Demonstration
from gtalign_jax.data.packing import PackedStream
from gtalign_jax.learning.sft import PackedBatch, SftBatch
from gtalign_jax.mesh import processes
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.run.job import Job
from gtalign_jax.run.phase import Metrics


def packed_batch(job: Job, stream: PackedStream, k: int) -> tuple[PackedBatch, Metrics]:
    """(this host's rows of step k, what is in the whole batch)."""
    rows = stream.batch(k)
    mine = processes.host_rows(len(rows.tokens), job.mesh)
    counts = {"tokens": int(rows.learn.sum()), "chains": rows.chains}
    batch = PackedBatch(rows.tokens, rows.segments, rows.positions, rows.learn, rows.weight)
    return jax.tree.map(lambda x: x[mine], batch), counts


def sft_batch(job: Job, k: int) -> tuple[SftBatch, Metrics]:
    """(this host's demonstrations of step k, what is in the whole batch)."""
    rows = job.feeds.demonstrations.batch(k)
    return padded_batch(job, rows), {"tokens": sum(len(c) for row in rows for c in row.completions)}


def padded_batch(job: Job, rows: Sequence[Demonstration]) -> SftBatch:
    """This host's share of a batch of demonstrations."""
    prompts = engine_lib.prompt_batch(job.engine, [row.prompt for row in rows])
    # The width of the prompts is the whole batch's, so that all hosts have the same shapes.
    mine, slots = processes.host_rows(len(rows), job.mesh), job.settings.max_new_tokens
    tokens, length = loader.pad_completions([rows[i].completions for i in mine], slots)
    mask, weight = np.arange(slots) < length[..., None], None
    if rows[0].weights:
        weight = loader.pad_weights([rows[i].weights for i in mine], slots)
    return SftBatch(jax.tree.map(lambda x: x[mine], prompts), tokens, mask, weight)


def held_out_batches(job: Job) -> Iterator[SftBatch]:
    """This host's shares of the held-out demonstrations, `sft.prompts` at a time; every token counts the
    same, and rows that fill up the last batch count nothing."""
    size = job.settings.sft.prompts
    for first in range(0, len(job.held_out), size):
        rows = list(job.held_out[first : first + size])
        spare = size - len(rows)
        batch = padded_batch(job, rows + rows[:1] * spare)
        there = processes.host_rows(size, job.mesh) < len(rows)
        yield batch.replace(mask=batch.mask & there[:, None, None], weight=None)
