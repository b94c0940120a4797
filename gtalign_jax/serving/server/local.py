"""Answers written by our own engine: the request's side of the scheduler's thread."""

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import cast

import numpy as np

from gtalign_jax.errors import UserError
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.continuous import Places, Row, check_row
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.token_bytes import token_bytes
from gtalign_jax.serving.server import priced
from gtalign_jax.serving.server.ask import ApiError, Ask, Messages, Prompt
from gtalign_jax.serving.server.echoed import echo
from gtalign_jax.serving.server.parts import Part, Said, Token, Usage
from gtalign_jax.serving.server.scheduler import LENGTH, Scheduler
from gtalign_jax.serving.server.text import Piece, TextStream
from gtalign_jax.serving.server.written import Stand, write
from gtalign_jax.serving.solution import solution


class Local:
    """A backend on one model folder."""

    def __init__(self, places: Places, name: str) -> None:
        self.models: Sequence[str] = (name,)
        self._places, self._scheduler = places, Scheduler(places)
        self._bytes = _bytes_of(places.engine)
        solution(np.zeros((2, 3, 2)))  # compiles the solver

    def answers(self, ask: Ask) -> Sequence[AsyncGenerator[Part]]:
        if ask.model not in (None, *self.models):
            raise ApiError(404, f"model {ask.model!r}: not here", param="model", code="model_not_found")
        seed = secrets.randbits(63) if ask.seed is None else ask.seed
        rows = []
        for p, prompt in enumerate(ask.prompts):
            ids = encode(self._places.engine, prompt, ask.go_on)
            rows += [make_row(self._places, ids, ask, stream_seed(seed, p, i)) for i in range(ask.n)]
        if ask.pricing is None:
            return [self._answer(ask, row) for row in rows]
        for row in rows:
            priced.first_row(self._places.engine, row)
        return [priced.answer(self._scheduler, self._places.engine, ask, row) for row in rows]

    def ready(self) -> bool:
        return self._scheduler.alive

    def numbers(self) -> dict[str, float]:
        load = self._scheduler.load()
        return {
            "rows_waiting": load.waiting,
            "rows_seated": load.seated,
            "places": self._places.count,
            "tokens_generated": load.tokens,
            "device_failures": load.failures,
        }

    async def close(self) -> None:
        await asyncio.to_thread(self._scheduler.close)

    async def _answer(self, ask: Ask, row: Row) -> AsyncGenerator[Part]:
        stream, begin = TextStream(self._places.engine, ask.stop), 0
        yield Part(usage=Usage(prompt=len(row.prompt)))
        if ask.echo:
            prompt = await echo(self._scheduler, self._places, row.prompt, ask.logprobs)
            yield Part(prompt.text, self._said(prompt, ask), LENGTH if ask.max_tokens == 0 else None)
            begin = len(prompt.text)
        if ask.max_tokens == 0:
            return
        with contextlib.closing(Stand(self._scheduler)) as stand:
            async with contextlib.aclosing(write(stand, row, stream)) as pieces:
                async for piece, count, finish in pieces:
                    yield Part(piece.text, self._said(piece, ask, begin), finish, Usage(completion=count))

    def _said(self, piece: Piece, ask: Ask, begin: int = 0) -> tuple[Said, ...]:
        """The tokens of a piece as they are reported; begin: characters before the text that it belongs to.

        After an echo the end token is one of them: who scores a text counts tokens.
        """
        if not ask.logprobs:
            return ()
        found = []
        for spoken in (*piece.tokens, *(piece.end if ask.echo else ())):
            likely = tuple(Token(*self._named(i), logp) for i, logp in spoken.likely[: ask.top])
            found.append(Said(*self._named(spoken.id), spoken.logp, begin + spoken.at, likely))
        return tuple(found)

    def _named(self, token: int) -> tuple[str, tuple[int, ...]]:
        """A token's text, and the bytes it adds, which may be a part of a character."""
        text = self._places.engine.tokenizer.decode([token], skip_special_tokens=False)
        known = self._bytes[token] if self._bytes else None
        return text, tuple(text.encode() if known is None else known)


def encode(engine: Engine, prompt: Prompt, go_on: bool = False) -> Sequence[int]:
    """A prompt's token ids; ApiError when it has none, or some that the model lacks.

    go_on: the last message is the beginning of the answer.
    """
    try:
        ids = _ids(engine, prompt, go_on)
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from error
    vocab = engine.model_config.vocab_size
    if not all(i < vocab for i in ids):
        raise ApiError(400, f"prompt: token ids are below {vocab}", param="prompt")
    return ids


def _ids(engine: Engine, prompt: Prompt, go_on: bool) -> Sequence[int]:
    if isinstance(prompt, str):
        return engine_lib.encode(engine, prompt)
    if isinstance(prompt[0], int):
        return cast(tuple[int, ...], prompt)
    messages = cast(Messages, prompt)
    if not go_on:
        return engine_lib.encode(engine, messages)
    begun = engine.tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    return [*engine_lib.encode(engine, messages[:-1]), *begun]


def make_row(places: Places, ids: Sequence[int], ask: Ask, seed: int) -> Row:
    """A row of the request; ApiError when no place holds it."""
    budget = places.slots if ask.max_tokens is None else max(1, ask.max_tokens)  # 0: nothing will be written
    row = Row(ids, seed, budget, ask.temperature, ask.top_p, top=ask.top > 0)
    longest = places.engine.buckets.prompt[-1]
    if len(ids) > longest:
        said = f"the prompt has {len(ids)} tokens; at most {longest} are read here"
        raise ApiError(400, said, code="context_length_exceeded")
    try:
        check_row(places, row)
    except UserError as error:
        raise ApiError(400, str(error)) from error
    return row


def stream_seed(seed: int, prompt: int, choice: int) -> int:
    """The random stream of a choice, 31 bits: seeds beside one another share nothing."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{choice}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1


def _bytes_of(engine: Engine) -> list[bytes | None] | None:
    """The bytes of every token; None where the tokenizer does not tell them, and their text must do."""
    try:
        return token_bytes(engine.tokenizer, engine.model_config.vocab_size)
    except UserError:
        return None
