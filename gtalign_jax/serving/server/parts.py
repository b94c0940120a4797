"""What a backend gives while it writes, and what a backend is.

A request is `choices` answers, each a stream of parts: `ask.n` for every prompt, in order.
"""

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from gtalign_jax.serving.server.ask import Ask


@dataclasses.dataclass(frozen=True)
class Token:
    """A token as it is reported: its text, its bytes, its log-probability, NaN where nothing predicts it."""

    text: str
    bytes: tuple[int, ...]
    logp: float


@dataclasses.dataclass(frozen=True)
class Said(Token):
    """A token of an answer or its prompt: the character it begins at, and the likely ones there, if asked."""

    at: int
    likely: tuple[Token, ...] = ()


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens read and written, in all passes of an answer."""

    prompt: int = 0
    completion: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt + other.prompt, self.completion + other.completion)


@dataclasses.dataclass(frozen=True)
class Part:
    """The next text of an answer.

    finish: None while more follows, then `stop` or `length`. usage: of what was not counted before. steering:
    what was done to the matrix, once.
    """

    text: str = ""
    tokens: tuple[Said, ...] = ()
    finish: str | None = None
    usage: Usage = Usage()
    steering: dict[str, Any] | None = None


class Backend(Protocol):
    """Who writes. Every method may raise `ApiError`."""

    models: Sequence[str]

    def answers(self, ask: Ask) -> Sequence[AsyncGenerator[Part]]:
        """A stream for each answer; what a request asks for in vain is said here, before any is read.

        Called in a thread of its own, of several at a time; the streams are read where the server runs.
        """

    def ready(self) -> bool:
        """Whether requests can be answered now."""

    def numbers(self) -> dict[str, float]:
        """What /metrics shows of it."""

    async def close(self) -> None:
        """Finish what was begun, then let go of all resources."""
