"""Micro-batches by token count: which prompts share one, and how their completions are laid into rows.

Planned on the host from lengths that came with the rollout. A prompt takes S + R*W token slots: its own and
the R rows of W slots that its group is packed into (`types.Packing`). The few allowed (R, W) are
`row_shapes`, so that there are few programs; each has a fixed number of prompts, the budget over their slots.
The prompts stay as wide as the batch's bucket: most of a prompt is the same instruction, so they hardly
differ, and every further width would be a set of programs of its own.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from gtalign_jax.errors import UserError

# Slots of a group's rows, as parts of all G*N. Finer steps would save less than the programs cost: with log-
# normal lengths these leave a third more slots than tokens, where powers of two alone leave two thirds.
STEPS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
Shape = tuple[int, int]


class MicroBatch(NamedTuple):
    """One micro-batch: rows [P_b] int32, its prompts, with the number of all prompts where none is;
    start [P_b, G] int32 and shape of their `Packing`."""

    rows: np.ndarray
    start: np.ndarray
    shape: Shape


class Schedule(NamedTuple):
    """updates: the micro-batches of every mini-batch, in their order; empty: one of every shape, without
    prompts, to compile all programs ahead of need."""

    updates: tuple[tuple[MicroBatch, ...], ...]
    empty: tuple[MicroBatch, ...]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the schedule of a rollout depends on besides its lengths.

    budget: token slots of a micro-batch. prompts: of a mini-batch. slots: S. group: G. width: N, and one more
    where the state after the last token is read too. shards: devices that split a batch.
    """

    budget: int
    prompts: int
    slots: int
    group: int
    width: int
    shards: int = 1

    @property
    def counts(self) -> dict[Shape, int]:
        """(R, W) → prompts of a micro-batch, the smallest shape first; shards divides all numbers."""
        self.check()
        most = math.ceil(self.prompts / self.shards) * self.shards
        return {shape: min(most, self._fitting(shape)) for shape in row_shapes(self.group, self.width)}

    def _fitting(self, shape: Shape) -> int:
        """Prompts with rows of this shape that the budget holds."""
        return self.budget // ((self.slots + math.prod(shape)) * self.shards) * self.shards

    def check(self) -> None:
        """UserError when the longest completions of one prompt a device do not fit the budget."""
        needed = (self.slots + self.group * self.width) * self.shards
        if needed > self.budget:
            raise UserError(
                f"algorithm.microbatch_tokens={self.budget}: {self.shards} devices, each with a prompt of "
                f"{self.slots} slots and {self.group} completions of {self.width}, take {needed}; raise it"
            )


def row_shapes(group: int, width: int) -> tuple[Shape, ...]:
    """The allowed (R, W), by slots; the last holds any G completions of up to `width` tokens."""
    shapes = set()
    for step in STEPS:
        rows = group * step
        shapes.add((math.ceil(rows), width) if rows >= 1 else (1, math.ceil(rows * width)))
    return tuple(sorted(shapes, key=math.prod))


def plan_schedule(length: np.ndarray, order: np.ndarray, sizes: Sizes) -> Schedule:
    """The micro-batches of mini-batches order [U, M] of prompts with completions of length [P, G].

    Within a mini-batch, prompts that need the most slots come first; a micro-batch takes as many as its
    first one's shape allows, so that only the last one may have empty places.
    """
    bins = [first_fit(row, sizes.width) for row in length]
    counts = sizes.counts
    least = [_smallest(row, own, counts) for row, own in zip(length, bins, strict=True)]
    updates = []
    for prompts in order:
        waiting = sorted(prompts.tolist(), key=lambda p: -math.prod(least[p]))
        parts = []
        while waiting:
            shape = least[waiting[0]]
            taken, waiting = waiting[: counts[shape]], waiting[counts[shape] :]
            parts.append(_micro_batch(taken, bins, shape, counts[shape], length.shape))
        updates.append(tuple(parts))
    empty = (_micro_batch([], [], shape, count, length.shape) for shape, count in counts.items())
    return Schedule(tuple(updates), tuple(empty))


def first_fit(length: Sequence[int], width: int) -> np.ndarray:
    """[G, 2]: the row of each completion and its first slot there, longest first into the first row with
    room."""
    filled: list[int] = []
    place = np.zeros((len(length), 2), int)
    for g in sorted(range(len(length)), key=lambda g: -int(length[g])):
        size = int(length[g])
        row = next((i for i, used in enumerate(filled) if used + size <= width), len(filled))
        if row == len(filled):
            filled.append(0)
        place[g] = row, filled[row]
        filled[row] += size
    return place


def _smallest(length: np.ndarray, place: np.ndarray, shapes: Iterable[Shape]) -> Shape:
    """The first shape that holds a group whose completions stand at `place`."""
    rows, longest = place[:, 0].max() + 1, (place[:, 1] + length).max()
    return next(shape for shape in shapes if shape[0] >= rows and shape[1] >= longest)


def _micro_batch(
    taken: Sequence[int], bins: Sequence[np.ndarray], shape: Shape, count: int, whole: tuple[int, int]
) -> MicroBatch:
    """The micro-batch of the prompts `taken`; whole: P and G of the rollout."""
    rows = np.full(count, whole[0], np.int32)
    rows[: len(taken)] = taken
    start = np.zeros((count, whole[1]), np.int32)
    for i, p in enumerate(taken):
        start[i] = bins[p][:, 0] * shape[1] + bins[p][:, 1]
    return MicroBatch(rows, start, shape)
