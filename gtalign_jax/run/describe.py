"""The data of a config, described (read whole, tokenised as the run would, then counted) or built."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from gtalign_jax.data import report, sources
from gtalign_jax.data.builders.build import build
from gtalign_jax.data.builders.opened import named_place
from gtalign_jax.data.config import DataConfig
from gtalign_jax.data.history import prompt_tokens
from gtalign_jax.data.item import Item
from gtalign_jax.data.sources import TEST, TRAIN, Loaded
from gtalign_jax.errors import UserError
from gtalign_jax.files import paths
from gtalign_jax.rewards.tasks.task import Tasks
from gtalign_jax.rollout import chat
from gtalign_jax.rollout.folder import load_tokenizer
from gtalign_jax.rollout.template import Messages, Template, peculiarities
from gtalign_jax.run import feeds
from gtalign_jax.run.job import make_tokenizer
from gtalign_jax.run.progress import stage
from gtalign_jax.run.settings import Settings, run_tasks
from gtalign_jax.run.shown import write_chains

SHOWN = 20  # lines about bad records


def describe_data(settings: Settings) -> report.Report:
    """The report of a run's data, as JSON values.

    Files are read whole, whatever `train_per_task` and `test_per_task` take of them; embedded questions, and
    a data set of the hub, which may have no end, as far as the run would. Records that cannot be read are
    counted, and the first SHOWN said.
    """
    config, tasks = settings.data, run_tasks(settings.data)
    loaded = {split: _whole(config, tasks, split) for split in (TRAIN, TEST)}
    bad = list(dict.fromkeys(line for found in loaded.values() for line in found.bad))
    if not any(found.items for found in loaded.values()):
        raise UserError(bad[0] if bad else f"config.data.source={config.source}: no item in either split")
    tokenizer, name = _tokenizer(settings, tasks, loaded)
    template = chat.ask_template(tokenizer)
    written = {}
    for split, found in loaded.items():
        items, written[split], refused = _written(tokenizer, template, found.items, settings)
        loaded[split] = dataclasses.replace(found, items=items)
        bad += refused
    return {
        "source": config.source,
        "tokenizer": name,
        "template": list(peculiarities(template)),
        "tasks": {task: _task(settings, tasks, task, loaded, written) for task in tasks},
        "left_out": {split: found.empty for split, found in loaded.items()},
        "bad": {"rows": len(bad), "lines": bad[:SHOWN]},
    }


def build_data(config: DataConfig, place: str) -> list[pathlib.Path]:
    """Write the data of a config as the TFDS data sets NAME/TASK of a place NAME[:FOLDER]; their folders."""
    name, folder = named_place(place)
    with stage(f"write {name} to {folder}"):
        return build(config, run_tasks(config), name, folder)


def _written(
    tokenizer: PreTrainedTokenizerBase, template: Template, items: Sequence[Item], settings: Settings
) -> tuple[list[Item], list[report.Written], list[str]]:
    """(items that the chat template writes, each one's prompt as the run would write it, lines of the
    others)."""

    def encode(messages: Messages) -> list[int]:
        return chat.encode_all(tokenizer, [messages], template=template)[0]

    def fits(tokens: Sequence[int]) -> bool:
        return len(tokens) <= settings.buckets.prompt[-1]

    data, kept, written, refused = settings.data, [], [], []
    for item in items:
        try:
            tokens, cut = prompt_tokens(item, encode, fits, data.history, data.too_long)
        except UserError as error:
            refused.append(str(error))
        else:
            kept.append(item)
            written.append(report.Written(len(tokens), cut))
    return kept, written, refused


def _whole(config: DataConfig, tasks: Tasks, split: str) -> Loaded:
    """All items of a split of those tasks that have it."""
    there = sources.with_split(config, tasks, split)
    limit = 0
    if config.source == "synthetic" or config.kind == "hub":
        limit = config.train_per_task if split == TRAIN else config.test_per_task
    return sources.read_source(config, there, split, limit, keep_going=True) if there else Loaded([], 0)


def _tokenizer(
    settings: Settings, tasks: Tasks, loaded: Mapping[str, Loaded]
) -> tuple[PreTrainedTokenizerBase, str]:
    """(the tokenizer of the starting model, its name); one that is made here is trained on the run's text."""
    path = settings.start.path
    if path:
        return load_tokenizer(paths.path(path), chat=True), path
    config = settings.data
    if config.streamed:
        items = feeds.sample(settings, tasks)
        return _named(make_tokenizer(settings, items, write_chains(items, tasks, settings)))
    items = loaded[TRAIN].items or loaded[TEST].items
    if config.train_per_task:
        items = [i for task in tasks for i in [i for i in items if i.task == task][: config.train_per_task]]
    items = [dataclasses.replace(item, id=number) for number, item in enumerate(items)]
    return _named(make_tokenizer(settings, items, write_chains(items, tasks, settings)))


def _named(tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedTokenizerBase, str]:
    return tokenizer, f"a tokenizer of {len(tokenizer)} made of the run's text"


def _task(
    settings: Settings,
    tasks: Tasks,
    name: str,
    loaded: Mapping[str, Loaded],
    written: Mapping[str, Sequence[report.Written]],
) -> dict[str, Any]:
    """The numbers of one task: of each split that it has, and of what both share."""
    mine: dict[str, list[Item]] = {}
    splits = {}
    for split, found in loaded.items():
        rows = [i for i, item in enumerate(found.items) if item.task == name]
        mine[split] = [found.items[i] for i in rows]
        if rows:
            prompts = [written[split][i] for i in rows]
            action, buckets = tasks[name].right_action, settings.buckets.prompt
            splits[split] = report.split_report(mine[split], prompts, buckets, action)
    both = mine[TRAIN] and mine[TEST]
    return {"splits": splits, "leaks": report.leak_report(mine[TRAIN], mine[TEST]) if both else None}
