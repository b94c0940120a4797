"""Chains to learn from that stand in a file: one line a chain, with the prompt that it answers."""

import dataclasses
import logging
from collections.abc import Sequence

from gtalign_jax import jsonl
from gtalign_jax.data.config import DataConfig
from gtalign_jax.data.history import instructed
from gtalign_jax.data.item import Item, Record, read_question, text_of
from gtalign_jax.data.sources import prompt_key
from gtalign_jax.errors import UserError, naming
from gtalign_jax.files import paths

log = logging.getLogger(__name__)


def read_demonstrations(
    path: str, config: DataConfig, held_out: Sequence[Item]
) -> tuple[list[Item], dict[int, list[str]]]:
    """(the prompts of a file, item id → their chains): its `messages` or `question`, and its `chain`.

    A conversation without a system message begins with the config's instruction. Those whose prompt is held
    out are left out, and counted. UserError names the line and field that are wrong.
    """
    asked = {prompt_key(item) for item in held_out}
    items: list[Item] = []
    chains: dict[int, list[str]] = {}
    left_out = 0
    for number, record in jsonl.stream(paths.path(path).expanduser()):
        with naming(f"{path}:{number}: "):
            item, chain = _read(record, config)
        if prompt_key(item) in asked:
            left_out += 1
            continue
        items.append(dataclasses.replace(item, id=len(items), where=f"{path}:{number}"))
        chains[len(chains)] = [chain]
    if left_out:
        log.warning("%d demonstrations of %s ask what is held out, and are left out", left_out, path)
    if not items:
        raise UserError(f"config.sft.demonstrations={path}: all its prompts are held out; name another file")
    return items, chains


def _read(record: Record, config: DataConfig) -> tuple[Item, str]:
    item, chain = read_question(record, several="\n"), text_of(record, "chain")
    if item is None or not chain.strip():
        raise ValueError("the last message or the chain is empty; remove the line")
    return dataclasses.replace(item, messages=instructed(item.messages, config.system)), chain
