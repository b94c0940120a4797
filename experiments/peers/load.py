"""Requests to an OpenAI server, so many at a time, and when each of their tokens came.

A client of few lines, because it runs on the cores of the server that it measures.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

PATH = "/v1/completions"


@dataclasses.dataclass(frozen=True)
class Answer:
    """How one streamed request ended.

    status: HTTP's; 0 where the connection broke, -1 where the end did not come in time. text: as it came.
    tokens: written, in all passes. first_s: from the request to its first text; token_s: for each token after
    that; both None without text. whole: the stream came to its end. choice: the last, for what else it says.
    """

    status: int
    text: str = ""
    tokens: int = 0
    first_s: float | None = None
    token_s: float | None = None
    whole: bool = False
    choice: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load(
    port: int, bodies: Sequence[Mapping[str, Any]], at_a_time: int, wait_s: float = 600.0
) -> list[Answer]:
    """Every body asked for as a stream, at most `at_a_time` at once."""
    return asyncio.run(_load(port, bodies, at_a_time, wait_s))


async def _load(
    port: int, bodies: Sequence[Mapping[str, Any]], at_a_time: int, wait_s: float
) -> list[Answer]:
    free = asyncio.Semaphore(at_a_time)

    async def one(body: Mapping[str, Any]) -> Answer:
        async with free:
            try:
                return await asyncio.wait_for(_ask(port, body), wait_s)
            except TimeoutError:
                return Answer(-1)
            except (OSError, asyncio.IncompleteReadError, ValueError, IndexError):
                return Answer(0)

    return await asyncio.gather(*map(one, bodies))


async def _ask(port: int, body: Mapping[str, Any]) -> Answer:
    begun, came = time.perf_counter(), list[tuple[float, bytes]]()
    data = json.dumps({"stream": True, "stream_options": {"include_usage": True}, **body}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    try:
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        async for line in reader:
            if line.startswith(b"data: {"):
                came.append((time.perf_counter() - begun, line))
    finally:
        writer.close()
    return _read(status, came)


def _read(status: int, came: Sequence[tuple[float, bytes]]) -> Answer:
    """What the events of a stream say."""
    tokens, texts, choice = 0, list[tuple[float, str]](), dict[str, Any]()
    for moment, line in came:
        event = json.loads(line.removeprefix(b"data: "))
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event.get("choices") or ():
            if choice.get("text"):
                texts.append((moment, choice["text"]))
    whole, text = bool(choice.get("finish_reason")), "".join(text for _, text in texts)
    if not texts:
        return Answer(status, text, tokens, whole=whole, choice=choice)
    (first, _), (last, _) = texts[0], texts[-1]
    return Answer(status, text, tokens, first, (last - first) / max(tokens - 1, 1), whole, choice)
