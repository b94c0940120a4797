"""What step k trains on, as a pure function of (seed, k): a run resumes with nothing but its step.

Examples are token lists. What fits no bucket is left out and named; a chain is never cut.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import grain
import numpy as np

from gtalign_jax.data.config import DataConfig
from gtalign_jax.data.history import prompt_tokens
from gtalign_jax.data.item import Item
from gtalign_jax.errors import UserError
from gtalign_jax.types import Array

NAMED = 5  # rows that a line names


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
    """An SFT example: prompt tokens and several completions of it, each ending with the end token.

    weights: of each completion's tokens in the loss; none: all alike.
    """

    prompt: list[int]
    completions: list[list[int]]
    weights: tuple[np.ndarray, ...] = ()


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
