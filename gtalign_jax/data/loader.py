"""Prompts and demonstrations in memory: step k trains on a pure function of (seed, k).

Examples are token lists. What fits no bucket is left out and named; a chain is never cut.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from gtalign_jax.data.config import DataConfig
from gtalign_jax.data.history import prompt_tokens
from gtalign_jax.data.item import Item
from gtalign_jax.data.order import Batching, Order, Rows
from gtalign_jax.errors import UserError
from gtalign_jax.types import Array

NAMED = 5  # rows that a line names
T = TypeVar("T")


class Prompt(NamedTuple):
    """An item and the tokens of its prompt."""

    item: Item
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Items with their prompt tokens. cut: how many of them lost the oldest turns of their history.

    dropped: items whose prompt fits no bucket.
    """

    items: list[Item]
    tokens: list[list[int]]
    cut: int = 0
    dropped: tuple[Item, ...] = ()


def encode_prompts(
    items: Sequence[Item],
    encode: Callable[[Sequence], list[int]],
    fits: Callable[[Sequence[int]], bool],
    config: DataConfig,
) -> PromptSet:
    """Tokenise every prompt with the chat template and keep those that fit a bucket."""
    encoded = [(item, *prompt_tokens(item, encode, fits, config.history, config.too_long)) for item in items]
    kept = [(item, tokens) for item, tokens, _ in encoded if fits(tokens)]
    if not kept:
        shortest = min((len(tokens) for _, tokens, _ in encoded), default=0)
        raise UserError(
            f"no prompt of {len(encoded)} fits: the shortest has {shortest} tokens; {mend_of_length(config)}"
        )
    return PromptSet(
        items=[item for item, _ in kept],
        tokens=[tokens for _, tokens in kept],
        cut=sum(cut for *_, cut in encoded),
        dropped=tuple(item for item, tokens, _ in encoded if not fits(tokens)),
    )


def mend_of_length(config: DataConfig) -> str:
    """What can be done about prompts that no bucket holds."""
    cut = "" if config.too_long == "cut" else ", or cut histories with config.data.too_long=cut"
    return f"raise the last of config.buckets.prompt{cut}"


def named(places: Sequence[str], count: int) -> str:
    """The first of `count` rows by where they stand, and how many there are besides."""
    shown = places[:NAMED]
    more = f" and {count - len(shown):,} more" if count > len(shown) else ""
    return "; ".join(shown) + more


def step_rows(count: int, batch: int, seed: int, step: int, shard: tuple[int, int] = (0, 1)) -> np.ndarray:
    """Row numbers [batch / shards] of step `step`: epoch after epoch, each newly shuffled.

    shard: (this host's index, number of hosts); hosts take contiguous parts of one global batch.
    """
    index, shards = shard
    part = batch // shards
    start = step * batch + index * part
    return np.array(Order((count,), seed).rows(start, start + part))


def rows_in_memory(
    rows: Sequence[T], parts: Sequence[int], config: DataConfig, batching: Batching[T]
) -> Rows[T]:
    """The batches of rows that are in memory, in the order of a config. parts [rows]: which of its tasks each
    is of, -1 for none."""
    if not config.weights or not rows:
        return Rows(rows, Order((len(rows),), config.seed), batching)
    if min(parts) < 0:
        raise UserError(
            "config.data.weights: a demonstration is of none of config.data.tasks; leave them out"
        )
    counts = np.bincount(parts, minlength=len(config.weights)).tolist()
    for task, count in zip(config.tasks, counts, strict=True):
        if not count:
            raise UserError(f"config.data.weights: task {task!r} has no training row; leave it out of both")
    by_part = [rows[i] for i in np.argsort(parts, kind="stable")]
    return Rows(by_part, Order(tuple(counts), config.seed, config.weights), batching)


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """An SFT example: prompt tokens and several completions of it, each ending with the end token.

    weights: of each completion's tokens in the loss; none: all alike. task: whose it is.
    """

    prompt: list[int]
    completions: list[list[int]]
    weights: tuple[np.ndarray, ...] = ()
    task: str = ""


def pad_completions(rows: Sequence[Sequence[Sequence[int]]], slots: int) -> tuple[Array, Array]:
    """(tokens [P, G, N], length [P, G]) of completions, right-padded with zeros to N = slots."""
    shape = (len(rows), len(rows[0]), slots)
    tokens, length = np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32)
    for p, group in enumerate(rows):
        for g, row in enumerate(group):
            tokens[p, g, : len(row)] = row
            length[p, g] = len(row)
    return tokens, length


def pad_weights(rows: Sequence[Sequence[np.ndarray]], slots: int) -> np.ndarray:
    """[P, G, N] float32: the weights of completions, right-padded with zeros to N = slots."""
    weight = np.zeros((len(rows), len(rows[0]), slots), np.float32)
    for p, group in enumerate(rows):
        for g, row in enumerate(group):
            weight[p, g, : len(row)] = row
    return weight
