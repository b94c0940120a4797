"""What a tokenizer's chat template says: how messages become text, and which token ends a turn.

A template is a program that came with the model: whatever it does instead of writing text is a UserError.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gtalign_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
STEPS = 3_000_000  # lines of Python that a template may take for two short messages; real ones take thousands
_NOW = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")
_ANSWER = "zqxjk"  # stands nowhere in a template


class _Endless(Exception):
    """A template went on and on."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    date: datetime.date | None = None,
    *,
    answered: bool = False,
) -> str:
    """Chat messages as text, ready to be answered, or `answered` already.

    date: what a template that asks for today is told (None: today).
    """
    if not tokenizer.chat_template:
        raise UserError("the model's tokenizer has no chat template; give plain text or token ids instead")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=_dated(tokenizer.get_chat_template(), date or datetime.date.today()),
            tokenize=False,
            add_generation_prompt=not answered,
        )
    except _Endless:
        raise
    except Exception as error:  # of any kind: it runs whatever stands in the template
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the chat template refuses these messages ({reason})") from error
    return text


def asks_for_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether texts of the chat template change with the date."""
    return _NOW.search(str(tokenizer.chat_template)) is not None


def _dated(template: str, date: datetime.date) -> str:
    """A template in which each call that asks for the time is the date it is to be told."""
    day = datetime.datetime.combine(date, datetime.time())
    return _NOW.sub(lambda call: json.dumps(day.strftime(call[2])), template)


def check_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """UserError when the chat template does not write one short message as text, or does not end."""
    try:
        text = _in_steps(lambda: render(tokenizer, [{"role": "user", "content": "Hello"}]))
    except _Endless as error:
        raise UserError(f"{where}: the chat template does not end; mend chat_template.jinja") from error
    except UserError as error:
        raise UserError(f"{where}: {error}; mend chat_template.jinja") from error
    if "Hello" not in text:
        raise UserError(f"{where}: the chat template leaves a message out; mend chat_template.jinja")


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after an answer; None when it writes none."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = _in_steps(lambda: render(tokenizer, messages, answered=True))
    except (UserError, _Endless):  # it writes no answers, only what asks for one
        return None
    _, _, tail = text.rpartition(_ANSWER)
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    return next((i for i in ids if i in special), None)


def _in_steps(make: Callable[[], str]) -> str:
    """What `make` returns; _Endless after STEPS lines of Python, counted rather than timed."""
    count, before = itertools.count(), sys.gettrace()

    def trace(*_: Any) -> Any:
        if next(count) > STEPS:
            raise _Endless
        return trace

    sys.settrace(trace)
    try:
        return make()
    finally:
        sys.settrace(before)
