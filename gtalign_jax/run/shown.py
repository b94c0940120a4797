"""What the cold start shows: chains of a file or of the built-in teacher, and exercises, as tokens."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import numpy as np

from gtalign_jax.chain.parse import BLOCKS
from gtalign_jax.chain.prompt import settled
from gtalign_jax.data import exercises, teacher
from gtalign_jax.data.demonstrations import read_demonstrations
from gtalign_jax.data.item import Item
from gtalign_jax.data.loader import Demonstration, PromptSet
from gtalign_jax.errors import UserError
from gtalign_jax.rewards.tasks.task import Tasks
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.spans import engine_tables, token_weights
from gtalign_jax.run.progress import stage
from gtalign_jax.run.settings import Settings

log = logging.getLogger(__name__)


def cold_start(
    train: Sequence[Item], test: Sequence[Item], tasks: Tasks, settings: Settings
) -> tuple[Sequence[Item], dict[int, list[str]]]:
    """(items that are shown with chains, item id → its chains): those of a file, or the training items with
    what the built-in teacher writes."""
    if settings.sft.trains and settings.sft.demonstrations:
        return read_demonstrations(settings.sft.demonstrations, settings.data, test)
    return train, write_chains(train, tasks, settings)


def write_chains(items: Sequence[Item], tasks: Tasks, settings: Settings) -> dict[int, list[str]]:
    """Item id → its cold-start chains, or plain answers; none when there is no SFT phase."""
    if not settings.sft.trains:
        return {}
    rng = np.random.default_rng([settings.data.seed, 11])
    write = teacher.write_answer if settings.features.plain else teacher.write_chain
    return {i.id: [write(i, tasks[i.task], rng) for _ in range(settings.sft.chains)] for i in items}


def demonstrations(
    engine: Engine, shown: PromptSet, chains: dict[int, list[str]], settings: Settings
) -> list[Demonstration]:
    """Tokenised chains of every prompt; those over max_new_tokens are dropped with a count."""
    if not chains:
        return []
    kept, dropped = [], 0
    for item, prompt in zip(shown.items, shown.tokens, strict=True):
        made = _demonstration(engine, prompt, chains[item.id], settings)
        if _fits(made, settings):
            kept.append(dataclasses.replace(made, task=item.task))
        else:
            dropped += 1
    if dropped:
        log.warning("%d demonstrations have over %d tokens and are dropped", dropped, settings.max_new_tokens)
    if not kept:
        raise UserError(f"config.max_new_tokens={settings.max_new_tokens}: no demonstration fits; raise it")
    weights = settings.sft.block_weights
    return _weighted(engine, kept, weights) if weights else kept


def write_exercises(
    engine: Engine, shown: Sequence[Demonstration], settings: Settings
) -> list[Demonstration]:
    """The rows of `config.sft.exercises`, in turn bare games and chains at a price; none without a chain.

    UserError when not even one game fits into a row.
    """
    count = 0 if settings.features.plain else round(settings.sft.exercises * len(shown))
    if not count:
        return []
    rng = np.random.default_rng([settings.data.seed, 14])
    games, priced = _games(engine, rng, settings), _priced(engine, rng, shown, settings)
    made: list[Demonstration] = []
    at_a_price: list[int] = []
    with stage(f"write {count} exercises", count) as advance:
        while len(made) < count:
            row = next(priced, None) if len(made) % 2 else None
            if row is not None:
                at_a_price.append(len(made))
            made.append(next(games) if row is None else row)
            advance(len(made))
    weights = settings.sft.block_weights or (1.0,) * len(BLOCKS)
    only = [weight * (block == "analyze") for block, weight in zip(BLOCKS, weights, strict=True)]
    weighted = _weighted(engine, [made[i] for i in at_a_price], only)
    for i, row in zip(at_a_price, weighted, strict=True):
        made[i] = row
    return made


def _games(engine: Engine, rng: np.random.Generator, settings: Settings) -> Iterator[Demonstration]:
    """Rows of as many games as fit into a completion, `exercises.GAMES` at most, without end."""
    prompt = engine_lib.encode(engine, exercises.PROMPT)
    chains = 1 if settings.sft.demonstrations else settings.sft.chains
    count = exercises.GAMES
    while count:
        texts = [
            exercises.block(exercises.write_games(rng, settings.steer.step, count)) for _ in range(chains)
        ]
        row = _demonstration(engine, prompt, texts, settings)
        if _fits(row, settings):
            yield row
        else:
            count -= 1
    raise UserError(f"config.max_new_tokens={settings.max_new_tokens}: no exercise fits; raise it")


def _priced(
    engine: Engine, rng: np.random.Generator, shown: Sequence[Demonstration], settings: Settings
) -> Iterator[Demonstration]:
    """Demonstrations with another matrix, at a price, in an order drawn again after every pass, without end;
    none if none has a matrix."""
    found = True
    while found:
        found = False
        for i in rng.permutation(len(shown)):
            written = [engine_lib.decode_tokens(engine, ids[:-1]) for ids in shown[i].completions]
            made = [exercises.write_priced(text, rng, settings.steer.step) for text in written]
            texts = [text for text in made if text is not None]
            if len(texts) < len(made):
                continue
            row = _demonstration(engine, shown[i].prompt, texts, settings, ends=False)
            if _fits(row, settings):
                found = True
                yield row


def _fits(row: Demonstration, settings: Settings) -> bool:
    return max(map(len, row.completions)) <= settings.max_new_tokens


def _weighted(engine: Engine, data: Sequence[Demonstration], weights: Sequence[float]) -> list[Demonstration]:
    """The demonstrations, their tokens weighted by the blocks that they are in as well."""
    rows = [row for each in data for row in each.completions]
    factors = iter(token_weights(engine_tables(engine, BLOCKS), weights, rows))
    return [
        dataclasses.replace(each, weights=tuple(own * next(factors) for own in each.weights)) for each in data
    ]


def _demonstration(
    engine: Engine, prompt: list[int], texts: Sequence[str], settings: Settings, ends: bool = True
) -> Demonstration:
    """A prompt with completions, which end as turns do or are cut, the choices in them weighted if wished."""
    weight, end = settings.sft.choice_weight, [engine.eos_ids[0]] * ends
    found = engine.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=weight != 1)
    rows = [[*ids, *end] for ids in found["input_ids"]]
    if not settings.sft.weighted:
        return Demonstration(prompt, rows)
    weights = [np.ones(len(row), np.float32) for row in rows]
    for text, spans, weighted in zip(texts, found.get("offset_mapping", ()), weights, strict=weight != 1):
        starts, stops = np.array(spans).T
        for start, stop in settled(text):
            weighted[: len(spans)][(starts < stop) & (stops > start)] = weight
    return Demonstration(prompt, rows, weights=tuple(weights))
