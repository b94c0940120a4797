"""What was said before the question: as turns or in one message, and how much of it a prompt has room for.

The instruction (the system message) and the question (the last message) are never cut.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from gtalign_jax.data.item import Item, Message, Record, published_messages, shown
from gtalign_jax.errors import UserError

HISTORIES = ("given", "turns", "flat")
TOO_LONG = ("drop", "cut")
_BEFORE, _NOW = "What was said before:", "The user now says:"
_SPEAKERS = {"user": "User", "assistant": "Assistant"}
Turns = tuple[Message, ...]


def published_turns(record: Record) -> Turns:
    """The conversation of a published row, its last message the question: `extra_info.chat_history` has its
    turns; a row without one asks its `single_turn_prompt` at once. The row's own `prompt` is an instruction
    with the first and the last of them in it.
    """
    extra = record.get("extra_info")
    extra = extra if isinstance(extra, Mapping) else {}
    if extra.get("chat_history"):
        turns = published_messages(extra["chat_history"], "extra_info.chat_history")
        if turns[-1]["role"] != "user":
            raise ValueError("extra_info.chat_history: must end with the user's message")
        return turns
    asked = extra.get("single_turn_prompt")
    if not isinstance(asked, str):
        raise ValueError(f"extra_info.single_turn_prompt {shown(asked)}: must be text, without chat_history")
    return ({"role": "user", "content": asked},)


def instructed(messages: Sequence[Message], instruction: str) -> Turns:
    """A conversation under an instruction, "" for none; one that has a system message keeps its own."""
    if not instruction or messages[0]["role"] == "system":
        return tuple(messages)
    return ({"role": "system", "content": instruction}, *messages)


def flattened(messages: Sequence[Message]) -> Turns:
    """The same conversation as one message of the user, who quotes what was said before the question."""
    system, turns = _apart(messages)
    if len(turns) == 1:
        return tuple(messages)
    said = [f"{_SPEAKERS.get(turn['role'], turn['role'])}: {turn['content']}" for turn in turns[:-1]]
    text = "\n\n".join([_BEFORE, *said, _NOW, turns[-1]["content"]])
    return (*system, {"role": "user", "content": text})


def shortened(messages: Sequence[Message]) -> Iterator[Turns]:
    """The conversation without its oldest turn, without its two oldest, and so on to the question alone.

    A turn is what the user says with the answers to it: each of these begins with the user.
    """
    system, turns = _apart(messages)
    for first in range(1, len(turns)):
        if turns[first]["role"] == "user":
            yield (*system, *turns[first:])


def prompt_tokens(
    item: Item,
    encode: Callable[[Sequence[Message]], list[int]],
    fits: Callable[[Sequence[int]], bool],
    history: str = "given",
    too_long: str = "drop",
) -> tuple[list[int], bool]:
    """(tokens of a prompt as `config.data` has it written, whether its history was cut to fit a bucket).

    Where nothing fits the tokens are those of the whole prompt. UserError names a record whose messages the
    chat template refuses.
    """
    write = flattened if history == "flat" else tuple
    try:
        whole = encode(write(item.messages))
        if too_long == "cut" and not fits(whole):
            for fewer in shortened(item.messages):
                if fits(tokens := encode(write(fewer))):
                    return tokens, True
    except UserError as error:
        raise UserError(f"{item.where}: {error}; mend the row, or set config.data.history=flat") from error
    return whole, False


def _apart(messages: Sequence[Message]) -> tuple[Turns, Turns]:
    """(the system message, if there is one; the turns after it)."""
    first = 1 if messages[0]["role"] == "system" else 0
    return tuple(messages[:first]), tuple(messages[first:])
