"""Which demonstrations the cold start trains on, and how many steps an epoch of them takes."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from gtalign_jax.data.loader import Demonstration
from gtalign_jax.data.packing import PackedStream
from gtalign_jax.errors import UserError
from gtalign_jax.run.settings import Settings, check_warmup


def divided(
    data: Sequence[Demonstration], settings: Settings
) -> tuple[Sequence[Demonstration], Sequence[Demonstration]]:
    """(demonstrations to train on, `sft.held_out` others), drawn by the data's seed. UserError when none
    would be left to train on."""
    count = settings.sft.held_out
    if not count or not data:
        return data, ()
    if count >= len(data):
        raise UserError(f"config.sft.held_out={count}: there are {len(data)} demonstrations; lower it")
    order = np.random.default_rng([settings.data.seed, 13]).permutation(len(data))
    held = set(order[:count].tolist())
    return [row for i, row in enumerate(data) if i not in held], [data[i] for i in sorted(held)]


def with_steps(settings: Settings, data: Sequence[Demonstration]) -> Settings:
    """The settings with the steps that `sft.epochs` passes over the demonstrations take."""
    if not settings.sft.epochs or not data:
        return settings
    steps = next(itertools.islice(epoch_ends(settings, data), settings.sft.epochs - 1, None))
    check_warmup(settings.sft_optimizer, "sft_optimizer", steps)
    return dataclasses.replace(settings, sft=dataclasses.replace(settings.sft, steps=steps))


def epoch_ends(settings: Settings, data: Sequence[Demonstration]) -> Iterator[int]:
    """For every epoch the number of steps after which each chain was trained on once more."""
    sft = settings.sft
    if not sft.pack:
        yield from (-(-epoch * len(data) // sft.prompts) for epoch in itertools.count(1))  # without an end
    stream = packed_stream(settings, data)
    chains, due = sum(len(row.completions) for row in data), 1
    seen = itertools.accumulate(stream.batch(k).chains for k in itertools.count())
    for steps, count in enumerate(seen, 1):
        while count >= due * chains:
            yield steps
            due += 1


def packed_stream(settings: Settings, data: Sequence[Demonstration]) -> PackedStream:
    """The batches of a cold start whose chains are packed into rows."""
    return PackedStream(data, settings.sft.prompts, settings.sft.pack, settings.data.seed)
