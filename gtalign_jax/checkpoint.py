"""Checkpoints of a phase: one Orbax manager, explicit trees in and out.

A checkpoint holds the state to the bit; the data order and every random key are functions of the step,
so nothing else is needed to go on.
"""

from __future__ import annotations

import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from gtalign_jax.errors import UserError
from gtalign_jax.types import PyTree

log = logging.getLogger(__name__)


def open_manager(folder: pathlib.Path, *, keep: int) -> ocp.CheckpointManager:
    """The manager of one phase's folder: saves are atomic and asynchronous, the newest `keep` stay."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(manager: ocp.CheckpointManager, step: int, state: PyTree, meta: dict[str, Any]) -> None:
    """Start writing `state` and the JSON `meta` as step `step`; arrays are copied before it returns."""
    arrays = ocp.args.StandardSave(_unwrap_keys(state))
    manager.save(step, args=ocp.args.Composite(state=arrays, meta=ocp.args.JsonSave(meta)))


def restore_latest(manager: ocp.CheckpointManager, like: PyTree) -> tuple[int, PyTree] | None:
    """The newest readable checkpoint as (step, state), or None when the folder has none.

    like: a state of the wanted structure, dtypes and shardings (arrays or ShapeDtypeStructs). A damaged
    checkpoint is named in a warning and the one before it is used; UserError if all are damaged.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        try:
            return step, restore(manager, step, like)
        except (ValueError, OSError, KeyError, FileNotFoundError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning(
                "checkpoint %s/%d is damaged (%s); trying the one before",
                manager.directory,
                step,
                reason,
            )
    if steps:
        raise UserError(f"{manager.directory}: no checkpoint can be read; remove the folder to start over")
    return None


def restore(manager: ocp.CheckpointManager, step: int, like: PyTree) -> PyTree:
    """The state saved as `step`, laid out as `like` (possibly on another mesh)."""
    target = jax.tree.map(_abstract, _unwrap_keys(like))
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    return _wrap_keys(manager.restore(step, args=args)["state"], like)


def drop_after(manager: ocp.CheckpointManager, step: int) -> None:
    """Delete the damaged checkpoints newer than `step`, so that the resumed run can save them again."""
    for newer in [s for s in manager.all_steps() if s > step]:
        manager.delete(newer)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _unwrap_keys(tree: PyTree) -> PyTree:
    """Typed random keys as their raw words, which every storage format knows."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _wrap_keys(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jax.random.wrap_key_data(x) if _is_key(y) else x, tree, like)


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
