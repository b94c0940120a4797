"""Batches in the shapes of an engine's buckets and on its devices."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import jax
import numpy as np

from gtalign_jax.mesh.sharding import batch_shards, place_batch
from gtalign_jax.rollout.buckets import bucket
from gtalign_jax.types import PromptBatch

if TYPE_CHECKING:
    from gtalign_jax.rollout.engine import Engine


def padded(engine: Engine, count: int) -> int:
    """How many prompts a batch of `count` is padded to."""
    rows = bucket(count, engine.buckets.batch, "batch", "the batch") if engine.buckets.batch else count
    return rows + -rows % shards(engine)


def place(engine: Engine, prompts: PromptBatch, rows: int) -> PromptBatch:
    """Pad to (rows, prompt bucket) and put on the devices, prompts spread over the mesh."""
    count, slots = prompts.tokens.shape
    width = bucket(slots, engine.buckets.prompt, "prompt", "the longest prompt")
    if (rows, width) != (count, slots):
        prompts = jax.device_get(prompts)
        extra = (0, rows - count)
        prompts = PromptBatch(
            tokens=np.pad(prompts.tokens, (extra, (0, width - slots))),
            length=np.pad(prompts.length, extra),
            id=np.pad(prompts.id, extra, constant_values=-1),
        )
    # A copy: the decode state takes these buffers over and gives them up when it is resumed.
    prompts = jax.tree.map(np.array, jax.device_get(prompts))
    return jax.device_put(prompts) if engine.mesh is None else place_batch(prompts, engine.mesh)


def shards(engine: Engine) -> int:
    """Over how many devices the prompts of a batch are spread."""
    return 1 if engine.mesh is None else batch_shards(engine.mesh)


def pad_rows(row: np.ndarray, rows: int) -> np.ndarray:
    """Row numbers or seeds [P, ...] of a batch padded to so many prompts."""
    return np.pad(row, [(0, rows - len(row)), *[(0, 0)] * (row.ndim - 1)])


def completion_slots(engine: Engine, max_new_tokens: int) -> int:
    """The bucket of a budget."""
    return bucket(max_new_tokens, engine.buckets.completion, "completion", "max_new_tokens")


def on_mesh(engine: Engine) -> contextlib.AbstractContextManager:
    """The context in which programs run."""
    return contextlib.nullcontext() if engine.mesh is None else jax.set_mesh(engine.mesh)
