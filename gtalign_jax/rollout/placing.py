"""Requests in the shapes of an engine's buckets and on its devices."""

import contextlib

import jax
import numpy as np

from gtalign_jax.mesh.sharding import batch_shards, place_batch
from gtalign_jax.rollout.buckets import bucket
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.request import Placed, Request
from gtalign_jax.types import PromptBatch


def padded(engine: Engine, count: int) -> int:
    """How many prompts a batch of `count` is padded to."""
    rows = bucket(count, engine.buckets.batch, "batch", "the batch") if engine.buckets.batch else count
    return rows + -rows % shards(engine)


def place(engine: Engine, request: Request, row: np.ndarray, count: int) -> Placed:
    """A request whose batch is padded to so many prompts; row: from `row_numbers`."""
    return Placed(
        prompts=place_prompts(engine, request.prompts, count),
        key=request.key,
        group_size=request.group_size,
        slots=completion_slots(engine, request.max_new_tokens),
        row=np.pad(row, [(0, count - len(row)), *[(0, 0)] * (row.ndim - 1)]),
    )


def place_prompts(engine: Engine, prompts: PromptBatch, rows: int) -> PromptBatch:
    """Pad to (rows, prompt bucket) and put on the devices, prompts spread over the mesh."""
    count, slots = prompts.tokens.shape
    width = bucket(slots, engine.buckets.prompt, "prompt", "the longest prompt")
    if (rows, width) != (count, slots):
        prompts = jax.device_get(prompts)
        extra = (0, rows - count)
        prompts = PromptBatch(
            tokens=np.pad(prompts.tokens, (extra, (0, width - slots))),
            length=np.pad(prompts.length, extra),
        )
    # A copy: the decode state takes these buffers over and gives them up when it is resumed.
    prompts = jax.tree.map(np.array, jax.device_get(prompts))
    return jax.device_put(prompts) if engine.mesh is None else place_batch(prompts, engine.mesh)


def shards(engine: Engine) -> int:
    """Over how many devices the prompts of a batch are spread."""
    return 1 if engine.mesh is None else batch_shards(engine.mesh)


def completion_slots(engine: Engine, max_new_tokens: int) -> int:
    """The bucket of a budget."""
    return bucket(max_new_tokens, engine.buckets.completion, "completion", "max_new_tokens")


def on_mesh(engine: Engine) -> contextlib.AbstractContextManager:
    """The context in which programs run."""
    return contextlib.nullcontext() if engine.mesh is None else jax.set_mesh(engine.mesh)
