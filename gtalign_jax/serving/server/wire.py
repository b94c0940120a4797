"""Bytes in and out of ASGI: bodies with limits, clients that leave, events that are sent as they come."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from gtalign_jax.serving.server.ask import ApiError

DONE = "[DONE]"
EVENTS = {"content-type": "text/event-stream", "cache-control": "no-cache"}


class ClientGone(Exception):
    """Nobody is there to be answered."""


async def read_body(receive: Receive, most: int, seconds: float) -> bytes:
    """The whole body. ApiError 413 for more than `most` bytes, 408 for one that does not come; ClientGone."""
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(seconds):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > most:
                    raise ApiError(413, f"the body is longer than {most} bytes", code="body_too_large")
    except TimeoutError as error:
        raise ApiError(408, f"the body did not come in {seconds:g} s", code="timeout") from error
    return bytes(body)


async def while_there(receive: Receive, work: Coroutine[Any, Any, None], seconds: float) -> None:
    """Do the work until it is done, the client leaves (ClientGone) or the time is up (TimeoutError)."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_leaving(receive))
    try:
        await asyncio.wait((task, watch), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        elif watch.done():
            raise ClientGone
        else:
            raise TimeoutError
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(send: Send, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
    """A whole answer."""
    data = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    await _start(
        send,
        status,
        {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})},
    )
    await send({"type": "http.response.body", "body": data})


async def send_error(send: Send, error: ApiError) -> None:
    """An error as the protocol writes it."""
    headers = {"retry-after": str(error.retry_s)} if error.retry_s else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    await send_json(send, error.body(), error.status, headers)


async def send_events(send: Send, events: AsyncGenerator[Any]) -> None:
    """JSON values as server-sent events, each when it comes; the answer begins with the first.

    What goes wrong before is an error of its own; after, it is the last event.
    """
    started = False
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                if not started:
                    started = True
                    await _start(send, 200, EVENTS)
                await send(_event(json.dumps(event, ensure_ascii=False, allow_nan=False)))
                await asyncio.sleep(0)  # sending to a client that left never waits: others have their turn
    except ApiError as error:
        if not started:
            raise
        await send(_event(json.dumps(error.body(), ensure_ascii=False)))
    await send(_event(DONE))
    await send({"type": "http.response.body", "body": b""})


def _event(data: str) -> Message:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}


async def _start(send: Send, status: int, headers: dict[str, str]) -> None:
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})


def header(scope: Scope, name: str) -> str | None:
    """A request's header, the last of several."""
    found = [value for key, value in scope["headers"] if key == name.encode()]
    return found[-1].decode("latin-1") if found else None
