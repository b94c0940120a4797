"""Generation that stops paying for rows that are done.

A batch runs until its longest row ends. Here the loop pauses when at most half of the rows are still
live; those are gathered into a batch of half the size and go on, then a quarter of them, and so on; the
last row goes on alone. The sizes are fixed, so a few programs serve every pattern of lengths; what a
row draws does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gtalign_jax.mesh import processes
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.rollout import programs
from gtalign_jax.rollout.decode import DecodeState, Ending, Pause
from gtalign_jax.rollout.grammar import Constraint
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.types import PromptBatch, PyTree, Rollout

FIRST_SHRINK = 2  # the second stage has half of the rows, because a step of all rows costs most
SHRINK = 4  # a later one has a quarter of the stage before, so that few programs are compiled
MIN_ROWS = 4  # between these and one row little is gained: the weights are read once a step
_PER_ROW = {"tokens": np.int32, "logp": np.float32, "action_mask": bool, "length": np.int32, "done": bool}
_SLOTTED = ("tokens", "logp", "action_mask")

Written = dict[str, np.ndarray]  # the rows of the result by name: [B, N] or [B]


def batch_sizes(rows: int, shards: int) -> tuple[int, ...]:
    """Rows of each stage, largest first, in multiples of the shards after the first.

    The last stage is one row a shard: a lone long answer takes about a third of a step of eight rows on
    CPU (7.8 against 20.6 ms for 32.5M parameters on one core).
    """
    sizes, shrink = [rows], FIRST_SHRINK
    while (smaller := -(-sizes[-1] // shrink // shards) * shards) >= MIN_ROWS and smaller < sizes[-1]:
        sizes.append(smaller)
        shrink = SHRINK
    return (*sizes, shards) if shards < sizes[-1] else tuple(sizes)


def finish(
    params: PyTree,
    config: ModelConfig,
    state: DecodeState,
    sampling: SamplingConfig,
    *,
    ending: Ending,
    until: int,
    every: int,
    sizes: Sequence[int],
    constraint: Constraint | None = None,
) -> Rollout:
    """Advance a state until every row is done or `until` tokens are decided; the result is on the host.

    every: as in `drain`. sizes: from `batch_sizes`.
    """
    shape = state.tokens.shape
    prompts = jax.tree.map(np.array, processes.fetch(state.prompts))  # a copy: advancing consumes the state
    written = empty_rows(shape[0] * shape[1], shape[2])
    options = {"ending": ending, "constraint": constraint}
    drain(
        programs.prepare(params, config),
        config,
        state,
        sampling,
        written=written,
        owner=np.arange(shape[0] * shape[1]),
        until=until,
        every=every,
        sizes=sizes,
        **options,
    )
    return as_rollout(written, prompts, shape[1])


def drain(
    params: PyTree,
    config: ModelConfig,
    state: DecodeState,
    sampling: SamplingConfig,
    *,
    written: Written,
    owner: np.ndarray,
    until: int,
    every: int,
    sizes: Sequence[int],
    **options: Any,
) -> None:
    """Advance until every row is done or has `until` tokens, and write them all.

    params: prepared. owner [B]: which row of the result each row of the state is, -1 for none. every: steps
    from one gathering of the live rows to the next, at least; 0 for none. options: ending and constraint.
    """
    after = 0
    while True:
        enough = max((s for s in sizes if s < len(owner)), default=0) if every else 0
        pause = Pause(np.int32(enough), np.int32(after))
        state = programs.advance(
            params, config, state, sampling, until=np.int32(until), pause=pause, **options
        )
        live = live_rows(state, until)
        size = min(s for s in sizes if s >= live.sum())
        if not live.any() or size < len(owner):
            write_rows(written, owner, state)
        if not live.any():
            return
        if size < len(owner):
            chosen = np.argsort(~live, kind="stable")[:size].astype(np.int32)
            state, owner, after = programs.take(config, state, chosen), owner[chosen], int(state.t) + every


def warm_up(
    params: PyTree,
    config: ModelConfig,
    state: DecodeState,
    sampling: SamplingConfig,
    *,
    ending: Ending,
    sizes: Sequence[int],
    constraint: Constraint | None = None,
) -> DecodeState:
    """Compile the steps of every size and every move between sizes; the state is consumed and given back."""
    options = {"ending": ending, "constraint": constraint, "until": np.int32(0)}
    pause = Pause(np.int32(0), np.int32(0))
    params = programs.prepare(params, config)
    for _ in range(2):  # what begins may lie otherwise on the devices than what goes on
        state = programs.advance(params, config, state, sampling, pause=pause, **options)
    for i, size in enumerate(sizes):
        stage = state if i == 0 else programs.take(config, state, np.arange(size, dtype=np.int32))
        for smaller in sizes[i + 1 :]:
            programs.take(config, stage, np.arange(smaller, dtype=np.int32))
        if i > 0:
            programs.advance(params, config, stage, sampling, pause=pause, **options)
    return state


# --- rows on the host ----------------------------------------------------------------------------


def live_rows(state: DecodeState, until: int) -> np.ndarray:
    """[P*G] bool on every host: the rows that are not done and have fewer than `until` tokens."""
    t, start, done = processes.fetch((state.t, state.start, state.done))
    decided = t if start is None else t - start
    return (~np.asarray(done) & (decided < until)).reshape(-1)


def empty_rows(rows: int, slots: int) -> Written:
    """Room for a result of so many rows."""
    return {
        name: np.zeros((rows, slots) if name in _SLOTTED else rows, kind) for name, kind in _PER_ROW.items()
    }


def write_rows(written: Written, owner: np.ndarray, state: DecodeState) -> None:
    """Copy the rows of the state to those of the result that own them [P*G]; -1 is none."""
    values, start = processes.fetch(({name: getattr(state, name) for name in _PER_ROW}, state.start))
    values = {name: np.asarray(value).reshape(-1, *value.shape[2:]) for name, value in values.items()}
    if start is not None:
        number = np.arange(values["tokens"].shape[1])
        slot, inside = (start + number) % len(number), number < values["length"][:, None]
        for name in _SLOTTED:
            values[name] = np.where(inside, np.take_along_axis(values[name], slot, axis=1), 0)
    owned = owner >= 0
    for name, value in values.items():
        # A state that was only begun has fewer slots than the result.
        into = written[name][:, : value.shape[1]] if name in _SLOTTED else written[name]
        into[owner[owned]] = value[owned]


def as_rollout(written: Written, prompts: PromptBatch, group_size: int) -> Rollout:
    """The rows of P prompts with their prompts."""
    rows = {name: value.reshape(-1, group_size, *value.shape[1:]) for name, value in written.items()}
    return Rollout(
        prompt=prompts.tokens,
        prompt_length=prompts.length,
        completion=rows["tokens"],
        length=rows["length"],
        finished=rows["done"],
        sampler_logp=rows["logp"],
        action_mask=rows["action_mask"],
    )
