"""Checkpoints of a phase: one Orbax manager, explicit trees in and out.

A checkpoint holds the state to the bit and a JSON `meta` (config, where the data stands); the data order
and every random key are functions of the step, so nothing else is needed to go on. It may be restored
onto another mesh or by another number of processes. On several processes all must call every function
here, on a folder that all of them see. Checksums of its files stand in it before it has its name, and are
checked before it is read; one without them (of 0.1.0) is read all the same.
"""

import contextlib
import errno
import functools
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gtalign_jax.errors import UserError
from gtalign_jax.files import drafts, paths
from gtalign_jax.mesh import processes
from gtalign_jax.run import checksums
from gtalign_jax.types import PyTree

log = logging.getLogger(__name__)
_NO_ROOM = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


def open_manager(
    folder: pathlib.Path, *, keep: int, keep_best: int = 0, best: str = "", read_only: bool = False
) -> ocp.CheckpointManager:
    """The manager of one phase's folder: saves are atomic and asynchronous.

    The newest `keep` stay, and so do the `keep_best` with the highest metric named `best`. read_only: nothing
    is touched, not even a save that another process has begun. UserError when a file stands where the folder
    belongs.
    """
    check_folder(folder)
    stay: list[Any] = [checkpoint_managers.LatestN(keep)]
    value = None
    if keep_best:
        if not best:
            raise UserError(f"checkpoint.keep_best={keep_best}: checkpoint.best must name a metric")
        value = functools.partial(_number, best)
        stay.append(
            checkpoint_managers.BestN(
                get_metric_fn=value, n=keep_best, keep_checkpoints_without_metrics=False
            )
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(stay),
        best_fn=value,
        create=not read_only,
        read_only=read_only,
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(
            post_finalization_callback=functools.partial(_write_checksums, paths.absolute(folder))
        ),
    )
    return ocp.CheckpointManager(paths.absolute(folder), options=options)


@contextlib.contextmanager
def naming_lost_saves(folder: pathlib.Path, state: PyTree) -> Iterator[None]:
    """A save of `state` that the disk has no room for as a UserError; Orbax raises when it is awaited."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many kinds, with the system's words in them
        reason = next((words for words in _NO_ROOM if words in str(error)), "")
        if not reason:
            raise
        size = sum(x.nbytes for x in jax.tree.leaves(_unwrap_keys(state)))
        raise UserError(
            f"{folder}: a checkpoint cannot be written ({reason}); it takes about {size:,} bytes: free some "
            "space and run the same command, which goes on from the one before"
        ) from error


def check_folder(folder: pathlib.Path) -> None:
    """Refuse a file where a folder of checkpoints belongs, before it is taken for an empty one."""
    for path in (folder.parent, folder):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file where checkpoints belong; move it away")


def check_place(workdir: pathlib.Path) -> None:
    """UserError where Orbax cannot keep the checkpoints of a run."""
    if paths.on_store(workdir) and not str(workdir).startswith("gs://"):
        raise UserError(f"--workdir={workdir}: checkpoints stay on a disk or on gs://; name such a folder")


def steps_in(folder: pathlib.Path) -> list[int]:
    """The steps of a phase's folder, readable or not, ascending; [] where it is not there."""
    found = (path for path in folder.glob("*") if path.name.isdigit())
    return sorted(int(path.name) for path in found if not _is_unmarked(path))


def has_steps(folder: pathlib.Path) -> bool:
    """Whether a phase's folder holds a checkpoint, readable or not."""
    return bool(steps_in(folder))


def _write_checksums(folder: pathlib.Path) -> None:
    """Called by process 0's saving thread when all files of the step being saved are written, just before
    they get their name, or on a store the mark that they are whole."""
    for path in folder.glob("*"):
        if "orbax-checkpoint-tmp" in path.name or (path.name.isdigit() and _is_unmarked(path)):
            checksums.write_sums(path)


def _is_unmarked(step: pathlib.Path) -> bool:
    """Whether a step on a store lacks the mark that all of it is there; on a disk its name says so."""
    return paths.on_store(step) and not (step / "commit_success.txt").is_file()


def _number(name: str, metrics: Mapping[str, Any]) -> float:
    """A metric, or minus infinity where there is none to compare."""
    value = metrics.get(name)
    return float(value) if value is not None and math.isfinite(value) else -math.inf


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: PyTree,
    meta: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Start writing `state` and the JSON `meta` as step `step`; arrays are copied before it returns.

    metrics: plain numbers, of which the manager's `best` is compared; ignored where nothing is.
    """
    arrays = ocp.args.StandardSave(_unwrap_keys(state))
    # Not finite is not JSON: left out, it ranks last.
    kept = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
    manager.save(
        step,
        args=ocp.args.Composite(state=arrays, meta=ocp.args.JsonSave(dict(meta))),
        metrics=kept,
    )


def read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The meta saved with a step; UserError naming the checkpoint when it cannot be read."""
    try:
        return dict(manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"])
    except Exception as error:  # Orbax raises many kinds, bare ones too
        raise UserError(f"{manager.directory}/{step}: its meta cannot be read ({_first(error)})") from error


def best_step(manager: ocp.CheckpointManager) -> int | None:
    """The step with the highest `best` metric, the newest where nothing is compared; None without any."""
    return manager.best_step()


def restore_latest(
    manager: ocp.CheckpointManager,
    like: PyTree,
    steps: Sequence[int] | None = None,
    *,
    needed: bool = True,
) -> tuple[int, PyTree] | None:
    """The newest readable checkpoint as (step, state), or None when the folder has none.

    like: a state of the wanted structure, dtypes and shardings (arrays or ShapeDtypeStructs). steps: those
    to try, in this order, instead of all from the newest on. A damaged checkpoint is named in a warning and
    the next one is used; if all are damaged it is a UserError, or None where none is `needed`.
    """
    if steps is None:
        steps = processes.from_main(lambda: steps_in(paths.path(manager.directory))[::-1])
    whole = set(manager.all_steps())
    for step in steps:
        state, reason = None, _damage(manager, step) if step in whole else "its save was not finished"
        if not reason:
            state, reason = _try(manager, step, like)
        if not reason:
            return step, state
        log.warning(
            "checkpoint %s/%d is damaged (%s); trying the one before", manager.directory, step, reason
        )
    if steps and needed:
        tried = ", ".join(map(str, steps))
        raise UserError(
            f"{manager.directory}: no checkpoint can be read (tried {tried}); remove the folder to start over"
        )
    return None


def _damage(manager: ocp.CheckpointManager, step: int) -> str:
    """What any process finds wrong with its share of the files of a step, or ""."""
    folder = paths.path(manager.directory) / str(step)
    found = checksums.damage(folder, jax.process_index(), jax.process_count())
    if found is None:
        log.debug("checkpoint %s has no checksums", folder)
    return next(filter(None, processes.all_gather(found)), "")


def _try(manager: ocp.CheckpointManager, step: int, like: PyTree) -> tuple[PyTree, str]:
    """(state, "") of a step, or (None, why it cannot be read) when a process cannot read its part."""
    state, reason = None, ""
    try:
        state = restore(manager, step, like)
        read_meta(manager, step)
    except (MemoryError, jax.errors.JaxRuntimeError):  # says nothing about the files
        raise
    except Exception as error:  # Orbax raises many kinds for damaged files, bare ones too
        reason = _first(error)
    # One process that cannot read its part sends all of them to the one before.
    reason = next(filter(None, processes.all_gather(reason)), "")
    return (None, reason) if reason else (state, "")


def _first(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def restore(manager: ocp.CheckpointManager, step: int, like: PyTree) -> PyTree:
    """The state saved as `step`, laid out as `like` (possibly on another mesh)."""
    target = jax.tree.map(_abstract, _unwrap_keys(like))
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    return _wrap_keys(manager.restore(step, args=args)["state"], like)


def drop_after(manager: ocp.CheckpointManager, step: int) -> None:
    """Delete the damaged checkpoints newer than `step`, so that the resumed run can save them again.

    On a store what a killed save left stands in the place of the next one, and goes too.
    """
    for newer in [s for s in manager.all_steps() if s > step]:
        manager.delete(newer)
    folder = paths.path(manager.directory)
    if processes.is_main():
        for left in [path for path in folder.glob("*") if path.name.isdigit() and _is_unmarked(path)]:
            drafts.remove(left)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _unwrap_keys(tree: PyTree) -> PyTree:
    """Typed random keys as their raw words, which every storage format knows."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _wrap_keys(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jax.random.wrap_key_data(x) if _is_key(y) else x, tree, like)


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
