"""What step k trains on, as a pure function of (seed, k): a run resumes with nothing but its step.

Examples are token lists; those that fit no bucket were dropped and counted, never cut.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import grain
import numpy as np

from gtalign_jax.data.item import Item
from gtalign_jax.errors import UserError
from gtalign_jax.types import Array


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Items with their prompt tokens. dropped: items whose prompt fits no bucket."""

    items: list[Item]
    tokens: list[list[int]]
    dropped: int


def encode_prompts(
    items: Sequence[Item], encode: Callable[[Sequence], list[int]], fits: Callable[[Sequence[int]], bool]
) -> PromptSet:
    """Tokenise every prompt with the chat template and keep those that fit a bucket."""
    encoded = [(item, encode(item.messages)) for item in items]
    kept = [(item, tokens) for item, tokens in encoded if fits(tokens)]
    if not kept:
        shortest = min((len(tokens) for _, tokens in encoded), default=0)
        raise UserError(
            f"no prompt of {len(encoded)} fits: the shortest has {shortest} tokens; "
            "raise the last of config.buckets.prompt"
        )
    return PromptSet([i for i, _ in kept], [t for _, t in kept], len(encoded) - len(kept))


def step_rows(count: int, batch: int, seed: int, step: int, shard: tuple[int, int] = (0, 1)) -> np.ndarray:
    """Row numbers [batch / shards] of step `step`: epoch after epoch, each newly shuffled.

    shard: (this host's index, number of hosts); hosts take contiguous parts of one global batch.
    """
    order = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    index, shards = shard
    part = batch // shards
    start = step * batch + index * part
    return np.array([order[i] for i in range(start, start + part)])


def steps_by_width(widths: Sequence[int], batch: int, seed: int, steps: Iterable[int]) -> dict[int, int]:
    """Width of a batch → the first of `steps` whose batch has it; a batch is as wide as its widest row.

    widths: of every row. Ends as soon as each of them was met.
    """
    found: dict[int, int] = {}
    for k in steps:
        found.setdefault(max(widths[i] for i in step_rows(len(widths), batch, seed, k)), k)
        if len(found) == len(set(widths)):
            break
    return found


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """An SFT example: prompt tokens and several completions of it, each ending with the end token."""

    prompt: list[int]
    completions: list[list[int]]


def pad_completions(rows: Sequence[Sequence[Sequence[int]]], slots: int) -> tuple[Array, Array]:
    """(tokens [P, G, N], length [P, G]) of completions, right-padded with zeros to N = slots."""
    shape = (len(rows), len(rows[0]), slots)
    tokens, length = np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32)
    for p, group in enumerate(rows):
        for g, row in enumerate(group):
            tokens[p, g, : len(row)] = row
            length[p, g] = len(row)
    return tokens, length
