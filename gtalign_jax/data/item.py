"""One prompt with what is needed to judge an answer to it, and how a dataset row becomes one."""

import dataclasses
import decimal
import math
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

    Raises UserError naming the file, the row and the column that is not as it must be.
    """
    where = f"{where}, row {id}"
    source = record["data_source"]
    if source not in SOURCE_TO_TASK:
        known = ", ".join(SOURCE_TO_TASK)
        raise UserError(f"{where}: data_source {source!r} is not a known task; known: {known}")
    messages = _messages(record["prompt"], where)
    model, extra = record["reward_model"], record.get("extra_info")
    if not isinstance(model, Mapping) or "ground_truth" not in model:
        raise UserError(f"{where}: reward_model {_shown(model)}: must be an object with ground_truth")
    if extra is not None and not isinstance(extra, Mapping):
        raise UserError(f"{where}: extra_info {_shown(extra)}: must be an object or null")
    truth, extra = truth_text(model["ground_truth"], where), extra or {}
    if not messages[-1]["content"].strip():
        return None
    return Item(
        id=id,
        messages=messages,
        source=source,
        task=SOURCE_TO_TASK[source],
        ground_truth=truth,
        intent=str(extra.get("single_turn_prompt") or messages[-1]["content"]),
        slots=extra.get("slots"),
    )


def truth_text(value: Any, where: str) -> str:
    """The text of a stored truth: a number's own text, `True` or `False`, nothing for null.

    UserError for a list or an object: a truth is one answer, and how several would count is not said.
    """
    if value is None:
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: reward_model.ground_truth {value}: must be finite")
    if isinstance(value, str | bool | int | float | decimal.Decimal):
        return str(value)
    raise UserError(
        f"{where}: reward_model.ground_truth {_shown(value)}: must be one text or number; give one answer"
    )


def _messages(prompt: Any, where: str) -> tuple[Mapping[str, str], ...]:
    """The chat messages of a row; null content is empty text."""
    if not isinstance(prompt, list) or not prompt:
        raise UserError(f"{where}: prompt {_shown(prompt)}: must be a list of messages with role and content")
    messages = []
    for number, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"{where}: prompt[{number}] {_shown(message)}: must have a role and content")
        content = "" if message.get("content") is None else message["content"]
        if not isinstance(content, str):
            raise UserError(
                f"{where}: prompt[{number}].content {_shown(content)}: must be text; join its parts"
            )
        messages.append({"role": message["role"], "content": content})
    return tuple(messages)


def _shown(value: Any) -> str:
    text = " ".join(ascii(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
