"""What a chat template does with messages, as it showed when it was asked (`chat.ask_template`).

A template is a program of the model's maker: some take no system message, or no two turns of one speaker in a
row. Messages are then put as it takes them, so that nothing of them is lost. What it does of its own is said.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

Messages = Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Template:
    """takes_system: it writes a system message. takes_repeats: it writes turns of one speaker in a row.

    default_system: the text that it adds where there is no system message. opens: what it writes of an answer
    before the model does, such as <think>. lost_blocks: blocks of a chain that it leaves out of the
    assistant's earlier turns. doubled_begin: the token that it begins a text with twice.
    """

    takes_system: bool = True
    takes_repeats: bool = True
    default_system: str = ""
    opens: str = ""
    lost_blocks: tuple[str, ...] = ()
    doubled_begin: str = ""


AS_GIVEN = Template()  # takes any messages as they are


def fitted(messages: Messages, template: Template) -> Messages:
    """The messages as the template takes them.

    A system message that it does not take opens the user's first turn, or is one where the assistant speaks
    first; turns of the same speaker in a row become one.
    """
    if not template.takes_system and messages[0]["role"] == "system":
        opening = {"role": "user", "content": messages[0]["content"]}
        messages = [*_merged([opening, *messages[1:2]]), *messages[2:]]
    return messages if template.takes_repeats else _merged(messages)


def _merged(messages: Messages) -> Messages:
    merged: list[Mapping[str, str]] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            both = f"{merged[-1]['content']}\n\n{message['content']}"
            merged[-1] = {"role": message["role"], "content": both}
        else:
            merged.append(message)
    return merged


def peculiarities(template: Template) -> Iterator[str]:
    """What is worth knowing of a template before a run, a sentence each."""
    if not template.takes_system:
        yield "takes no system message: the instruction opens the user's first turn"
    if not template.takes_repeats:
        yield "takes no two turns of one speaker in a row: they are written as one"
    if template.default_system:
        yield f"adds {template.default_system!r} where there is no system message"
    if template.opens:
        yield f"opens each answer with {template.opens!r}: a chain is written after it"
    if template.lost_blocks:
        blocks = ", ".join(template.lost_blocks)
        yield f"leaves {blocks} out of earlier answers: config.data.history=flat keeps chains whole"
    if template.doubled_begin:
        begin = template.doubled_begin
        yield f"begins each text with {begin!r} twice, and so do servers: mend chat_template.jinja"
