"""One prompt with what is needed to judge an answer to it, and how a dataset row becomes one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gtalign_jax.errors import UserError

# `data_source` of the published rows → our task name.
SOURCE_TO_TASK = {
    "math-hard": "math",
    "medium": "medium",
    "ambig_qa": "ambig_qa",
    "wildguard": "wildguard",
    "minerva": "minerva_math",
    "abg-coqa": "ambig_coqa",
    "advbench": "advbench",
}


@dataclasses.dataclass(frozen=True)
class Item:
    """id: row in its list. messages: the prompt as chat messages. source: data_source as in the file.

    task: our task name. ground_truth: label, reference or answer. intent: the question a judge sees.
    slots: what an embedded task was written from; None for real data. seen: a test item whose prompt also
    stands in the training split.
    """

    id: int
    messages: tuple[Mapping[str, str], ...]
    source: str
    task: str
    ground_truth: str
    intent: str
    slots: Mapping[str, Any] | None = None
    seen: bool = False


def item_of(record: Mapping[str, Any], id: int, where: str) -> Item | None:
    """The item of a dataset row, or None when its last message is empty.

    Raises UserError naming the file and row when data_source is not a known task.
    """
    source = record["data_source"]
    if source not in SOURCE_TO_TASK:
        known = ", ".join(SOURCE_TO_TASK)
        raise UserError(f"{where}, row {id}: data_source {source!r} is not a known task; known: {known}")
    messages = tuple({"role": m["role"], "content": m["content"] or ""} for m in record["prompt"])
    if not messages or not messages[-1]["content"].strip():
        return None
    extra = record.get("extra_info") or {}
    return Item(
        id=id,
        messages=messages,
        source=source,
        task=SOURCE_TO_TASK[source],
        ground_truth=str(record["reward_model"]["ground_truth"] or ""),
        intent=str(extra.get("single_turn_prompt") or messages[-1]["content"]),
        slots=extra.get("slots"),
    )
