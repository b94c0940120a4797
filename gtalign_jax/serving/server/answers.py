"""The protocol's answers in JSON, whole and in pieces, from an answer's parts."""

import asyncio
import contextlib
import dataclasses
import math
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from gtalign_jax.serving.server.ask import Ask
from gtalign_jax.serving.server.parts import Part, Said, Token, Usage
from gtalign_jax.serving.server.text import APART, Shown, View

NEVER = -9999.0  # the protocol's logarithm of nothing
Answers = Sequence[AsyncGenerator[Part]]


@dataclasses.dataclass
class Account:
    """What a request has come to so far, for its log line and the counters.

    first_s: of the first text, on time.monotonic. texts: pieces of each answer, where they may be logged.
    """

    usage: Usage = Usage()
    first_s: float | None = None
    finishes: list[str] = dataclasses.field(default_factory=list)
    steering: Counter[str] = dataclasses.field(default_factory=Counter)
    texts: dict[int, list[str]] | None = None

    def note(self, index: int, part: Part) -> None:
        self.usage += part.usage
        if part.text and self.first_s is None:
            self.first_s = time.monotonic()
        if part.finish:
            self.finishes.append(part.finish)
        if part.steering:
            self.steering["steered" if part.steering["steered"] else "unsteered"] += 1
        if self.texts is not None:
            self.texts.setdefault(index, []).append(part.text)


async def whole(ask: Ask, answers: Answers, model: str, account: Account) -> dict[str, Any]:
    """All answers in one object."""
    choices = [_Choice(ask, i) for i in range(len(answers))]
    async with contextlib.aclosing(_parts(answers, account)) as parts:
        async for i, part in parts:
            choices[i].keep(part)
    return {
        **_head(ask, model, "chat.completion" if ask.chat else "text_completion"),
        "choices": [choice.whole() for choice in choices],
        "usage": usage_json(account.usage),
    }


async def chunks(ask: Ask, answers: Answers, model: str, account: Account) -> AsyncGenerator[dict[str, Any]]:
    """The same as events: pieces of each answer, its end, and the usage when it was asked for."""
    head = _head(ask, model, "chat.completion.chunk" if ask.chat else "text_completion")
    choices = [_Choice(ask, i) for i in range(len(answers))]
    async with contextlib.aclosing(_parts(answers, account)) as parts:
        async for i, part in parts:
            for piece in choices[i].chunks(part):
                yield {**head, "choices": [piece]}
    if ask.usage:
        yield {**head, "choices": [], "usage": usage_json(account.usage)}


def usage_json(usage: Usage) -> dict[str, int]:
    total = usage.prompt + usage.completion
    return {"prompt_tokens": usage.prompt, "completion_tokens": usage.completion, "total_tokens": total}


def _head(ask: Ask, model: str, kind: str) -> dict[str, Any]:
    name = f"{'chatcmpl' if ask.chat else 'cmpl'}-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


async def _parts(answers: Answers, account: Account) -> AsyncGenerator[tuple[int, Part]]:
    """(answer, part) in the order in which they come. When nobody reads on, every answer is given up."""
    told = asyncio.Queue[tuple[int, Part | Exception | None]]()

    async def listen(i: int) -> None:
        try:
            async with contextlib.aclosing(answers[i]) as parts:
                async for part in parts:
                    told.put_nowait((i, part))
            told.put_nowait((i, None))
        except Exception as error:  # raised below, where the request is
            told.put_nowait((i, error))

    tasks = [asyncio.ensure_future(listen(i)) for i in range(len(answers))]
    left = len(answers)
    try:
        while left:
            i, part = await told.get()
            if isinstance(part, Exception):
                raise part
            if part is None:
                left -= 1
            else:
                account.note(i, part)
                yield i, part
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Choice:
    """One answer as the client is to see it."""

    def __init__(self, ask: Ask, index: int) -> None:
        self._ask, self._index, self._view = ask, index, View(ask.reasoning)
        self._reasoning, self._content, self._tokens = list[str](), list[str](), list[Said]()
        self._finish: str | None = None
        self._steering: dict[str, Any] | None = None
        self._begun = False

    def add(self, part: Part) -> Shown:
        """What of a part is shown; kept for `whole`."""
        shown = self._view.feed(part.text)
        if part.finish:
            last = self._view.end()
            shown = Shown(shown.reasoning + last.reasoning, shown.content + last.content)
        self._finish = part.finish or self._finish
        self._steering = part.steering or self._steering
        return shown

    def keep(self, part: Part) -> None:
        """Take a part into the whole answer."""
        shown = self.add(part)
        self._reasoning.append(shown.reasoning)
        self._content.append(shown.content)
        self._tokens += part.tokens

    def whole(self) -> dict[str, Any]:
        shown = Shown("".join(self._reasoning), "".join(self._content))
        said: dict[str, Any] = self._text(shown)
        if self._ask.chat:
            said = {"message": {"role": "assistant", **self._message(shown), "refusal": None}}
        return self._json(said, self._tokens)

    def chunks(self, part: Part) -> Iterator[dict[str, Any]]:
        """The events that a part is worth, in a chat one for the role before the first.

        None before there is something to say: what goes wrong until then is an error with a status.
        """
        shown = self.add(part)
        if not (shown.reasoning or shown.content or part.tokens or part.finish):
            return
        if self._ask.chat and not self._begun:
            yield self._json({"delta": {"role": "assistant", "content": ""}}, (), over=False)
        self._begun = True
        said = {"delta": self._message(shown)} if self._ask.chat else self._text(shown)
        yield self._json(said, part.tokens, over=bool(part.finish))

    def _message(self, shown: Shown) -> dict[str, str]:
        apart = {"reasoning_content": shown.reasoning} if self._ask.reasoning == APART else {}
        return {**apart, "content": shown.content}

    def _text(self, shown: Shown) -> dict[str, str]:
        apart = {"reasoning_content": shown.reasoning} if self._ask.reasoning == APART else {}
        return {"text": shown.content, **apart}

    def _json(self, said: dict[str, Any], tokens: Sequence[Said], over: bool = True) -> dict[str, Any]:
        found = {
            "index": self._index,
            **said,
            "logprobs": None,
            "finish_reason": self._finish if over else None,
        }
        if self._ask.logprobs and tokens:
            as_asked = _chat_logprobs if self._ask.chat else _text_logprobs
            found["logprobs"] = as_asked(tokens, self._ask.top)
        if self._steering and over:
            found["steering"] = self._steering
        return found


def _chat_logprobs(tokens: Sequence[Said], top: int) -> dict[str, Any]:
    said = [{**_named(t), "top_logprobs": [_named(one) for one in t.likely[:top]]} for t in tokens]
    return {"content": said, "refusal": None}


def _named(token: Token) -> dict[str, Any]:
    return {"token": token.text, "logprob": _logprob(token), "bytes": list(token.bytes)}


def _text_logprobs(tokens: Sequence[Said], top: int) -> dict[str, Any]:
    """The likely tokens of each by their text, with the one that is there; of two alike the likelier.

    The first token of a prompt has no log-probability, and nothing beside it.
    """

    def beside(token: Said) -> dict[str, float] | None:
        ranked = sorted((*token.likely[:top], token), key=lambda one: one.logp)
        return None if math.isnan(token.logp) else {one.text: _logprob(one) for one in ranked}

    return {
        "tokens": [t.text for t in tokens],
        "token_logprobs": [None if math.isnan(t.logp) else _logprob(t) for t in tokens],
        "top_logprobs": [beside(t) for t in tokens] if top else None,
        "text_offset": [t.at for t in tokens],
    }


def _logprob(token: Token) -> float:
    return max(token.logp, NEVER) if math.isfinite(token.logp) else NEVER
