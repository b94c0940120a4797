"""What a tokenizer's chat template says: how messages become text, and which token ends a turn.

A template is a program that came with the model: whatever it does instead of writing text is a UserError.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gtalign_jax.chain.parse import BLOCKS
from gtalign_jax.errors import UserError
from gtalign_jax.rollout.template import AS_GIVEN, Messages, Template, fitted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEPS = 3_000_000  # lines of Python that a template may take for two short messages; real ones take thousands
_NOW = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")
_ASKED, _ANSWER, _TOLD = "qzvxw", "zqxjk", "xkqjz"  # stand nowhere in a template


class _Endless(Exception):
    """A template went on and on."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    date: datetime.date | None = None,
    *,
    answered: bool = False,
    template: Template = AS_GIVEN,
    thinks: bool | None = None,
) -> str:
    """Chat messages as text, ready to be answered, or `answered` already.

    date: what a template that asks for today is told (None: today). template: what it does with messages,
    which are put as it takes them. thinks: whether an answer is to begin with a reasoning, for templates that
    ask (None: what they do unasked).
    """
    told = {} if thinks is None else {"enable_thinking": thinks}
    asked = [fitted(messages, template)]
    return render_all(tokenizer, asked, date, add_generation_prompt=not answered, **told)[0]


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    date: datetime.date | None = None,
    template: Template = AS_GIVEN,
) -> list[list[int]]:
    """Token ids of each of several conversations, as `render` writes them."""
    if not conversations:
        return []
    asked = [fitted(messages, template) for messages in conversations]
    texts = render_all(tokenizer, asked, date, add_generation_prompt=True)
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"])


def render_all(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    date: datetime.date | None,
    **told: bool,
) -> list[str]:
    """What the chat template makes of conversations, all at once; told: what it is told besides."""
    if not tokenizer.chat_template:
        raise UserError("the model's tokenizer has no chat template; give plain text or token ids instead")
    try:
        return tokenizer.apply_chat_template(
            [[dict(message) for message in messages] for messages in conversations],
            chat_template=_dated(tokenizer.get_chat_template(), date or datetime.date.today()),
            tokenize=False,
            **told,
        )
    except _Endless:
        raise
    except Exception as error:  # of any kind: it runs whatever stands in the template
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the chat template refuses these messages ({reason})") from error


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


def ask_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """What the chat template does with messages, found by having it write some."""
    if not tokenizer.chat_template:
        return AS_GIVEN
    user, answer = {"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWER}
    blocks = {name: f"<{name}>\n{_TOLD}\n</{name}>" for name in BLOCKS}
    chain = {"role": "assistant", "content": "\n".join(blocks.values())}
    alone, begin = _written(tokenizer, [user]), str(tokenizer.bos_token or "")
    under = _written(tokenizer, [{"role": "system", "content": _TOLD}, user])
    twice = _written(tokenizer, [user, {"role": "user", "content": _TOLD}])
    talk = _written(tokenizer, [user, chain, user])
    asked = _written(tokenizer, [user], answered=True)
    return Template(
        takes_system=_TOLD in under,
        takes_repeats=_ASKED in twice and _TOLD in twice,
        default_system=_added(under, alone),
        opens=_opened(alone, asked, _written(tokenizer, [user, answer], answered=True)),
        lost_blocks=tuple(name for name in BLOCKS if talk and blocks[name] not in talk),
        doubled_begin=begin if begin and alone.startswith(2 * begin) else "",
    )


def _written(tokenizer: PreTrainedTokenizerBase, messages: Messages, answered: bool = False) -> str:
    """The text of messages as they are, "" where the template does not write them."""
    try:
        return _in_steps(lambda: render(tokenizer, messages, answered=answered))
    except (UserError, _Endless):
        return ""


def _added(under: str, alone: str) -> str:
    """What stands before a question in the place of the system message that it does not have.

    under, alone: texts of the question with the system message _TOLD, and without one.
    """
    before, _, after = under.partition(_TOLD)
    after, alone = after.partition(_ASKED)[0], alone.partition(_ASKED)[0]
    if not (under and alone.startswith(before) and alone.endswith(after)):
        return ""
    return alone[len(before) : len(alone) - len(after)].strip()


def _opened(alone: str, asked: str, answered: str) -> str:
    """What stands after a question that is to be answered and not before its answer _ANSWER.

    alone, asked, answered: texts of the question to be answered, not to be, and with its answer.
    """
    if not (alone.startswith(asked) and answered.startswith(asked)):
        return ""
    tail, head = alone[len(asked) :], answered[len(asked) :].partition(_ANSWER)[0]
    return tail[len(os.path.commonprefix([tail, head])) :].strip()


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after an answer; None when it writes none."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER}]
    text = _written(tokenizer, messages, answered=True)  # "" where it writes only what asks for an answer
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
