"""Answers written by another server, with a price: a proxy in front of any OpenAI-compatible one.

    pass 1   prompt, stop at </payoff>          → <thinking> … <payoff> M
    pass 2   prompt and the text up to M'       → <analyze> … <response> …

What continues a prefix is a text completion whose prompt ends with it, and a chat whose last message is the
assistant's and is to be gone on with (`continue_final_message`, which vLLM and SGLang have). The splice is
text here: which tokens the upstream reads it as is its own matter.
"""

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import cast

import numpy as np
import openai

from gtalign_jax.errors import UserError
from gtalign_jax.serving.server import priced
from gtalign_jax.serving.server.ask import ApiError, Ask, Messages, Prompt
from gtalign_jax.serving.server.events import events
from gtalign_jax.serving.server.parts import Part, Usage
from gtalign_jax.serving.server.priced import ENDED, Cut
from gtalign_jax.serving.server.scheduler import LENGTH, STOP
from gtalign_jax.serving.server.text import Before
from gtalign_jax.serving.server.told import read_part
from gtalign_jax.serving.solution import solution
from gtalign_jax.serving.splice import CLOSE, OPEN, UNSTEERED, read_payoff, splice_text

Answer = AsyncGenerator[Part]
OTHER = 1_000_003  # from the seed of a first try to that of the next


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


@dataclasses.dataclass
class _First:
    """A first pass: its text, of which `sent` characters were given out, its tokens, and how it ended.

    reason: which stop string ended it, where the upstream says so.
    """

    text: str = ""
    sent: int = 0
    written: int = 0
    finish: str | None = None
    reason: str | None = None


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
        async with contextlib.aclosing(self._answer(ask, ask.prompts[0], ask.max_tokens)) as parts:
            async for part in parts:
                yield part

    async def _priced(self, ask: Ask) -> Answer:
        prompt = ask.prompts[0]
        for attempt in range(ask.tries):
            seed = None if ask.seed is None else (ask.seed + attempt * OTHER) % 2**63
            tried, first = dataclasses.replace(ask, seed=seed), _First()
            async with contextlib.aclosing(self._begin(tried, first)) as begun:
                async for part in begun:
                    yield part
            cut, prefix = _edit(ask, first)
            cut = dataclasses.replace(cut, tries=attempt + 1)
            if cut.edited is not None or (prefix is None and first.reason is not None):
                break
        priced.check_usable(ask, cut)
        if prefix is None:
            said = priced.steering(ask, cut, first.text)
            yield Part(first.text[first.sent :], finish=first.finish, steering=said)
            return
        yield Part(prefix[first.sent :])
        left = None if ask.max_tokens is None else ask.max_tokens - first.written
        if left is not None and left < 1:
            yield Part(finish=LENGTH, steering=priced.steering(ask, cut, prefix))
            return
        rest = self._answer(tried, _continued(prompt, prefix), left, go_on=True)
        async with contextlib.aclosing(rest) as parts:
            async for part in parts:
                prefix += part.text
                done = priced.steering(ask, cut, prefix) if part.finish else None
                yield dataclasses.replace(part, steering=done)

    async def _answer(self, ask: Ask, prompt: Prompt, budget: int | None, go_on: bool = False) -> Answer:
        """The parts of what ends an answer, without a stop string that the upstream leaves in its text."""
        before = Before(*(() if ask.echo else ask.stop))  # which a prompt may hold
        async with contextlib.aclosing(self._read(ask, prompt, ask.stop, budget, go_on)) as parts:
            async for part, _ in parts:
                text = before.feed(part.text) + (before.end() if part.finish else "")
                yield dataclasses.replace(part, text=text)

    async def _begin(self, ask: Ask, first: "_First") -> Answer:
        """The parts of a first pass, up to its matrix."""
        before, stops = Before(OPEN), (CLOSE, *ask.stop)
        async with contextlib.aclosing(self._read(ask, ask.prompts[0], stops, ask.max_tokens)) as parts:
            async for part, stopped_by in parts:
                first.text += part.text
                shown = before.feed(part.text) if ask.unusable == UNSTEERED else ""
                first.sent, first.written = first.sent + len(shown), first.written + part.usage.completion
                first.finish, first.reason = part.finish or first.finish, stopped_by or first.reason
                yield Part(shown, usage=part.usage)

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
            "logprobs": (ask.chat or ask.top) if ask.logprobs else None,
            "top_logprobs": ask.top if ask.chat and ask.top else None,
            "echo": ask.echo or None,
        }
        if ask.chat and (go_on or ask.go_on):
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        finish, at, usage = None, 0, Usage()
        async with contextlib.aclosing(events(self._client, ask.chat, body)) as found:
            async for event in found:
                part, reason = read_part(event, ask.chat, at)
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


def _edit(ask: Ask, first: _First) -> tuple[Cut, str | None]:
    """What a first pass goes on with, and its text; None when it ended before its matrix did.

    An upstream that names no stop string stopped at </payoff> if what stands before it is a whole matrix.
    """
    reason = first.reason
    if first.finish != STOP or OPEN not in first.text or reason not in (None, CLOSE):
        return ENDED, None
    whole = first.text.partition(CLOSE)[0] + CLOSE
    try:
        payoff = read_payoff(whole)
    except UserError as error:
        said = str(error).partition(";")[0]
        return (Cut((), reason=said), whole) if reason == CLOSE else (ENDED, None)
    assert ask.pricing is not None
    edited = priced.edited_payoff(payoff, ask.pricing)
    kept, following = splice_text(whole, edited, ask.analyze)
    return Cut((), payoff, edited), whole[:kept] + following
