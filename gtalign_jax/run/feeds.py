"""What the steps of a run train on: rows in memory, or rows read and tokenised while others train."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from gtalign_jax.data import sources, teacher
from gtalign_jax.data.builders.opened import open_sets
from gtalign_jax.data.examples import MakeDemonstrations, MakePrompts
from gtalign_jax.data.item import Item
from gtalign_jax.data.loader import Demonstration, Prompt, PromptSet, rows_in_memory
from gtalign_jax.data.order import Batching, Feed, Order
from gtalign_jax.data.stream import Reading, Stream
from gtalign_jax.errors import UserError
from gtalign_jax.mesh import processes
from gtalign_jax.rewards.tasks.task import Tasks
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.encoder import make_encoder
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.run.settings import Settings, SftConfig

SAMPLE = 4096  # rows that a tokenizer is trained on where they are streamed


@dataclasses.dataclass(frozen=True)
class Feeds:
    """What each phase trains on, by step; how many rows there are, with those that a stream leaves out."""

    prompts: Feed[Prompt]
    demonstrations: Feed[Demonstration]
    prompt_rows: int
    demonstration_rows: int


def in_memory(
    settings: Settings, tasks: Tasks, engine: Engine, train: PromptSet, shown: Sequence[Demonstration]
) -> Feeds:
    """Feeds of prompts and demonstrations that are all there."""
    prompts = [Prompt(item, tokens) for item, tokens in zip(train.items, train.tokens, strict=True)]
    number = {task: i for i, task in enumerate(tasks)}
    parts = [number[item.task] for item in train.items], [number.get(row.task, -1) for row in shown]
    of_prompt, of_shown = _batchings(settings, engine)
    return Feeds(
        rows_in_memory(prompts, parts[0], settings.data, of_prompt),
        rows_in_memory(shown, parts[1], settings.data, of_shown),
        len(prompts),
        len(shown),
    )


def streamed(
    settings: Settings, tasks: Tasks, engine: Engine, train: PromptSet, shown: Sequence[Demonstration]
) -> Feeds:
    """Feeds of a source that is read as it is needed; demonstrations that were recorded are in memory."""
    make = _prompts(settings, tasks, engine)
    order = _order(settings, make.sets.counts)
    reading = Reading(jax.process_index(), jax.process_count(), processes.exchanged, settings.data.workers)
    of_prompt, of_shown = _batchings(settings, engine)
    prompts, rows = Stream(make, order, of_prompt, reading), sum(order.counts)
    if settings.sft.demonstrations:
        return dataclasses.replace(
            in_memory(settings, tasks, engine, train, shown), prompts=prompts, prompt_rows=rows
        )
    for name in ("pack", "epochs", "block_weights", "held_out", "exercises", "choice_weight"):
        if settings.sft.trains and getattr(settings.sft, name) != getattr(SftConfig(), name):
            raise UserError(
                f"config.sft.{name}: needs demonstrations in memory, and these are streamed; set "
                "config.data.train_per_task, or name a file of them in config.sft.demonstrations"
            )
    demonstrations = MakeDemonstrations(
        make,
        chains=functools.partial(_chains, settings, tasks),
        encode=functools.partial(_ids, engine.tokenizer),
        end=engine.eos_ids[0],
        longest=settings.max_new_tokens,
    )
    return Feeds(prompts, Stream(demonstrations, order, of_shown, reading), rows, rows)


def sample(settings: Settings, tasks: Tasks) -> list[Item]:
    """Items of the first rows that a streamed source has for a run, SAMPLE at most."""
    data = settings.data
    sets, read = open_sets(data.place, data.split_name(sources.TRAIN), tasks), sources.reader(data, tasks)
    numbers = _order(settings, sets.counts).rows(0, min(SAMPLE, sum(sets.counts)))
    rows = zip(numbers, sets.rows(numbers), strict=True)
    found = [sources.read_row(row, read, number) for number, row in rows]
    return [item for item in found if item is not None]


def _chains(settings: Settings, tasks: Tasks, item: Item) -> list[str]:
    """The cold-start chains, or plain answers, of an item of a streamed source, a function of (seed, row)."""
    rng = np.random.default_rng([settings.data.seed, 11, item.id])
    write = teacher.write_answer if settings.features.plain else teacher.write_chain
    return [write(item, tasks[item.task], rng) for _ in range(settings.sft.chains)]


def _prompts(settings: Settings, tasks: Tasks, engine: Engine) -> MakePrompts:
    data = settings.data
    held_out = sources.read_source(data, tasks, sources.TEST, 0).items if data.decontaminate else []
    return MakePrompts(
        sets=open_sets(data.place, data.split_name(sources.TRAIN), tasks),
        read=sources.reader(data, tasks),
        encode=make_encoder(engine),
        config=data,
        longest=settings.buckets.prompt[-1],
        held_out=frozenset(map(sources.prompt_key, held_out)),
    )


def _order(settings: Settings, counts: Sequence[int]) -> Order:
    """The order of rows of several data sets, one a task."""
    data = settings.data
    if data.weights and len(counts) != len(data.weights):
        raise UserError(
            f"config.data.weights: tfds:{data.place} is one data set for all tasks; leave them out"
        )
    return Order(tuple(counts), data.seed, data.weights)


def _batchings(settings: Settings, engine: Engine) -> tuple[Batching[Prompt], Batching[Demonstration]]:
    """How prompts and how demonstrations become batches."""

    def slots(tokens: Sequence[int]) -> int:
        return engine_lib.prompt_slots(engine, tokens)

    seed, window = settings.data.seed, settings.data.bucket_steps
    return (
        Batching(settings.align.prompts, lambda row: slots(row.tokens), seed, window),
        Batching(settings.sft.prompts, lambda row: slots(row.prompt), seed, window),
    )


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"])
