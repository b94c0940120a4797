"""Answers written by another server, with a price: a proxy in front of any OpenAI-compatible one.

    pass 1   prompt, stop at </payoff>          → <thinking> … <payoff> M
    pass 2   prompt and the text up to M'       → <analyze> … <response> …

What continues a prefix is a text completion whose prompt ends with it, and a chat whose last message is the
assistant's and is to be gone on with (`continue_final_message`, which vLLM and SGLang have). The splice is
text here: which tokens the upstream reads it as is its own matter.
"""

import contextlib
import dataclasses
import math
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

import numpy as np
import openai

from gtalign_jax.errors import UserError
from gtalign_jax.serving.server import priced
from gtalign_jax.serving.server.ask import ApiError, Ask, Messages, Prompt
from gtalign_jax.serving.server.events import events
from gtalign_jax.serving.server.parts import Part, Said, Usage
from gtalign_jax.serving.server.priced import Cut
from gtalign_jax.serving.server.scheduler import LENGTH, STOP
from gtalign_jax.serving.server.text import Before
from gtalign_jax.serving.solution import solution
from gtalign_jax.serving.splice import CLOSE, OPEN, read_payoff, splice_text

Answer = AsyncGenerator[Part]


async def find_models(client: openai.AsyncOpenAI, url: str) -> Sequence[str]:
    """What the upstream calls its models. UserError when it cannot be asked, or has none."""
    try:
        names = [model.id for model in (await client.models.list()).data]
    except (openai.OpenAIError, AttributeError, TypeError, ValueError) as error:
        said = type(error.__cause__ or error).__name__
        raise UserError(
            f"--upstream={url}: its models cannot be listed ({said}); is it an OpenAI server?"
        ) from error
    if not names:
        raise UserError(f"--upstream={url}: has no models; start it with one")
    return names


class Upstream:
    """A backend on another server's URL."""

    def __init__(self, client: openai.AsyncOpenAI, models: Sequence[str]) -> None:
        self.models: Sequence[str] = models
        self._client = client
        solution(np.zeros((2, 3, 2)))  # compiles the solver
        self._open = 0

    def answers(self, ask: Ask) -> Sequence[Answer]:
        if ask.pricing is not None:
            _check_priced(ask)
        found: list[Answer] = []
        for prompt in ask.prompts:
            for _ in range(ask.n):
                seed = None if ask.seed is None else ask.seed + len(found)
                one = dataclasses.replace(ask, prompts=(prompt,), n=1, seed=seed)
                found.append(self._counted(self._plain(one) if ask.pricing is None else self._priced(one)))
        return found

    def ready(self) -> bool:
        return True

    def numbers(self) -> dict[str, float]:
        return {"upstream_open": self._open}

    async def close(self) -> None:
        await self._client.close()

    async def _counted(self, parts: Answer) -> Answer:
        self._open += 1
        try:
            async with contextlib.aclosing(parts):
                async for part in parts:
                    yield part
        finally:
            self._open -= 1

    async def _plain(self, ask: Ask) -> Answer:
        async with contextlib.aclosing(self._read(ask, ask.prompts[0], ask.stop, ask.max_tokens)) as parts:
            async for part, _ in parts:
                yield part

    async def _priced(self, ask: Ask) -> Answer:
        prompt, text, sent, before = ask.prompts[0], "", 0, Before(OPEN)
        finish, reason, written = None, None, 0
        async with contextlib.aclosing(self._read(ask, prompt, (CLOSE, *ask.stop), ask.max_tokens)) as parts:
            async for part, stopped_by in parts:
                text += part.text
                shown = before.feed(part.text)
                sent, written = sent + len(shown), written + part.usage.completion
                finish, reason = part.finish or finish, stopped_by or reason
                yield Part(shown, usage=part.usage)
        cut, prefix = _edit(ask, text, finish, reason)
        if prefix is None:
            yield Part(text[sent:], finish=finish, steering=priced.steering(ask, cut, text))
            return
        yield Part(prefix[sent:])
        left = None if ask.max_tokens is None else ask.max_tokens - written
        if left is not None and left < 1:
            yield Part(finish=LENGTH, steering=priced.steering(ask, cut, prefix))
            return
        async with contextlib.aclosing(
            self._read(ask, _continued(prompt, prefix), ask.stop, left, go_on=True)
        ) as parts:
            async for part, _ in parts:
                prefix += part.text
                done = priced.steering(ask, cut, prefix) if part.finish else None
                yield dataclasses.replace(part, steering=done)

    async def _read(
        self, ask: Ask, prompt: Prompt, stops: Sequence[str], budget: int | None, go_on: bool = False
    ) -> AsyncGenerator[tuple[Part, str | None]]:
        """(part, which stop string ended it, where the upstream says so) of one completion."""
        body = {
            "model": ask.model or self.models[0],
            "messages" if ask.chat else "prompt": list(prompt) if not isinstance(prompt, str) else prompt,
            "stream_options": {"include_usage": True},
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "max_tokens": budget,
            "stop": list(stops) or None,
            "seed": ask.seed,
            "logprobs": (ask.chat or 0) if ask.logprobs else None,
        }
        if ask.chat and (go_on or ask.go_on):
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        finish, at, usage = None, 0, Usage()
        async with contextlib.aclosing(events(self._client, ask.chat, body)) as found:
            async for event in found:
                part, reason = _part(event, ask.chat, at)
                finish, at = part.finish or finish, at + len(part.text)
                usage = part.usage if part.usage != Usage() else usage  # of all so far, where it comes twice
                yield dataclasses.replace(part, finish=None, usage=Usage()), reason
        if finish is None:
            raise ApiError(502, "the upstream's answer has no end", code="upstream")
        yield Part(finish=finish, usage=usage), None


def _check_priced(ask: Ask) -> None:
    """ApiError for what has no text to go on from."""
    if any(not isinstance(prompt, str) and isinstance(prompt[0], int) for prompt in ask.prompts):
        raise ApiError(400, "prompt: with a price and an upstream it must be text", param="prompt")


def _continued(prompt: Prompt, prefix: str) -> Prompt:
    if isinstance(prompt, str):
        return prompt + prefix
    return (*cast(Messages, prompt), {"role": "assistant", "content": prefix})


def _edit(ask: Ask, text: str, finish: str | None, reason: str | None) -> tuple[Cut, str | None]:
    """What a first pass goes on with, and its text; None when it ended before its matrix did.

    reason: which stop string the upstream names. One that names none stopped at </payoff> if what stands
    before it is a whole matrix.
    """
    ended = Cut((), reason="the answer ended before its matrix did")
    if finish != STOP or OPEN not in text or reason not in (None, CLOSE):
        return ended, None
    whole = text.partition(CLOSE)[0] + CLOSE
    try:
        payoff = read_payoff(whole)
    except UserError as error:
        said = str(error).partition(";")[0]
        return (Cut((), reason=said), whole) if reason == CLOSE else (ended, None)
    assert ask.pricing is not None
    edited = priced.edited_payoff(payoff, ask.pricing)
    kept, following = splice_text(whole, edited, ask.analyze)
    return Cut((), payoff, edited), whole[:kept] + following


def _part(event: dict[str, Any], chat: bool, at: int) -> tuple[Part, str | None]:
    """An event as a part, and the stop string it names; at: characters before it."""
    usage = event.get("usage")
    read, written = (_count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
    choice = event["choices"][0] if event["choices"] else {}
    delta = choice.get("delta") if chat else choice
    text = (delta.get("content" if chat else "text") if isinstance(delta, dict) else None) or ""
    if not isinstance(text, str):
        raise ApiError(502, "the upstream's text is no text", code="upstream")
    finish, reason = choice.get("finish_reason"), choice.get("stop_reason")
    finish = None if finish is None else LENGTH if finish == LENGTH else STOP
    said = _said(choice.get("logprobs"), chat, at)
    return Part(text, said, finish, Usage(read, written)), reason if isinstance(reason, str) else None


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value >= 0 else 0


def _said(logprobs: Any, chat: bool, at: int) -> tuple[Said, ...]:
    """The tokens of an event, where it has any in the protocol's form."""
    if not isinstance(logprobs, dict):
        return ()
    try:
        if chat:
            pairs = [(one["token"], one["logprob"]) for one in logprobs.get("content") or ()]
        else:
            pairs = list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))
        found = []
        for token, logp in pairs:
            value = float(logp) if logp is not None else -math.inf
            found.append(Said(token, tuple(token.encode()), value, at))
            at += len(token)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ApiError(502, "the upstream's logprobs have another form", code="upstream") from error
    return tuple(found)
