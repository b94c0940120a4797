"""One prompt with what is needed to judge an answer to it, and how a record of a data set becomes one.

A reader is a function `record → Item | None`: it raises ValueError with the field that is not as it must be
(whoever reads the file says which file and row), and gives None for a record that is not for its task. The
place of an item in its list and the name of its task are filled in by `data.sources`.
"""

import dataclasses
import decimal
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

Record = Mapping[str, Any]
Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Item:
    """id: row in its list. messages: the prompt as chat messages. source: data_source as in the file.

    task: our task name. ground_truth: label, reference or answer. intent: the question a judge sees.
    slots: what an embedded task was written from; None for real data. seen: a test item whose prompt also
    stands in the training split. name: the `id` of its record, "" where there is none.
    turn: which turn of its conversation a published row is of; 0 where it does not say. where: the file and
    row of its record.
    """

    id: int
    messages: tuple[Message, ...]
    source: str
    task: str
    ground_truth: str
    intent: str
    slots: Mapping[str, Any] | None = None
    seen: bool = False
    name: str = ""
    turn: int = 0
    where: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Row:
    """where: file and row, for messages. whole: it stands in a file that holds both splits. task: the folder
    of its file, where that names one. published: its record is a row of the published files. seen: a test row
    whose prompt is known to stand in the training split."""

    where: str
    record: Record
    whole: bool = False
    task: str = ""
    published: bool = False
    seen: bool = False


Read = Callable[[Record], Item | None]


class Readable(Protocol):
    """What reading data needs to know of a task.

    source: the data_source of its published rows. needs_truth: an item without a truth is a mistake.
    """

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def read(self) -> Read: ...

    @property
    def needs_truth(self) -> bool: ...


def make_item(messages: Sequence[Message], truth: str, intent: str = "", name: str = "") -> Item | None:
    """An item that has no place yet; None when its last message is empty. intent: "" is the last message."""
    last = messages[-1]["content"]
    if not last.strip():
        return None
    return Item(0, tuple(messages), "", "", truth, intent or last, name=name)


def read_published(record: Record, several: str = "") -> Item | None:
    """The item of a row of the published files: `prompt`, `reward_model`, perhaps `extra_info`.

    several: as in `read_question`.
    """
    messages = published_messages(record["prompt"], "prompt")
    model, extra = record["reward_model"], record.get("extra_info")
    if not isinstance(model, Mapping) or "ground_truth" not in model:
        raise ValueError(f"reward_model {shown(model)}: must be an object with ground_truth")
    if extra is not None and not isinstance(extra, Mapping):
        raise ValueError(f"extra_info {shown(extra)}: must be an object or null")
    truth, extra = truth_text(model["ground_truth"], "reward_model.ground_truth", several), extra or {}
    item = make_item(messages, truth, str(extra.get("single_turn_prompt") or ""))
    turn = record.get("turn_id")
    return item and dataclasses.replace(
        item, slots=extra.get("slots"), turn=turn if isinstance(turn, int) else 0
    )


def read_question(record: Record, several: str = "") -> Item | None:
    """The item of a record with `question` or `messages`, and perhaps `truth`, `intent` and `id`.

    several: what joins the texts of a truth that is a list; "" refuses one.
    """
    if record.get("messages") is not None:
        messages = _messages(record["messages"])
    elif record.get("question") is not None:
        messages = ({"role": "user", "content": text_of(record, "question")},)
    else:
        raise ValueError("neither question nor messages: give one of them, or map it with config.data.fields")
    name = record.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise ValueError(f"id {shown(name)}: must be a text or a whole number")
    intent = text_of(record, "intent") if record.get("intent") is not None else ""
    truth = truth_text(record.get("truth"), "truth", several)
    return make_item(messages, truth, intent, "" if name is None else str(name))


def text_of(record: Record, field: str) -> str:
    """The text of a field that must be one; ValueError names it otherwise."""
    value = record.get(field)
    if not isinstance(value, str):
        raise ValueError(f"{field} {shown(value)}: must be text")
    return whole_text(value, field)


def whole_text(text: str, field: str) -> str:
    """The text; ValueError when it holds half a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{field} holds half a surrogate pair ({half}): mend or remove it") from error
    return text


def check_texts(item: Item) -> None:
    """ValueError for a text of an item that no tokenizer reads, whichever reader it came from."""
    for message in item.messages:
        whole_text(message["role"] + message["content"], "a message")
    whole_text(item.ground_truth, "truth")
    whole_text(item.intent, "intent")
    whole_text(item.name, "id")


def truth_text(value: Any, field: str, several: str = "") -> str:
    """The text of a stored truth: a number's own text, `True` or `False`, nothing for null.

    ValueError for an object, and for a list unless `several` joins its texts: a truth is one answer, and
    how several would count is not said.
    """
    if value is None:
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{field} {value}: must be finite")
    if isinstance(value, str | bool | int | float | decimal.Decimal):
        return whole_text(str(value), field)
    if several and isinstance(value, list):
        return several.join(truth_text(each, f"{field}[{i}]") for i, each in enumerate(value))
    raise ValueError(f"{field} {shown(value)}: must be one text or number; give one answer")


def shown(value: Any) -> str:
    """A value as a message quotes it: on one line and not long."""
    text = " ".join(ascii(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def published_messages(value: Any, field: str) -> tuple[Message, ...]:
    """The chat messages in a field of a published row; null content is empty text."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field} {shown(value)}: must be a list of messages with role and content")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{field}[{number}] {shown(message)}: must have a role and content")
        content = "" if message.get("content") is None else message["content"]
        if not isinstance(content, str):
            raise ValueError(f"{field}[{number}].content {shown(content)}: must be text; join its parts")
        texts = {"role": message["role"], "content": content}
        messages.append({key: whole_text(text, f"{field}[{number}].{key}") for key, text in texts.items()})
    return tuple(messages)


def _messages(value: Any) -> tuple[Message, ...]:
    """The turns of a conversation that waits for the assistant's next one."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages {shown(value)}: must be a list of objects with role and content")
    messages = []
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise ValueError(f"{where} {shown(message)}: role must be one of {', '.join(ROLES)}")
        if message["role"] == "system" and number:
            raise ValueError(f"{where}: a system message comes first")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{where}.content {shown(message.get('content'))}: must be text; join its parts")
        content = whole_text(message["content"], f"{where}.content")
        messages.append({"role": message["role"], "content": content})
    if messages[-1]["role"] != "user":
        raise ValueError(f"messages: the last one is the {messages[-1]['role']}'s; end with the user's")
    return tuple(messages)
