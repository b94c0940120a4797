"""The events of another server's stream: JSON objects, or an `ApiError` that says what it did instead."""

import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import openai

from gtalign_jax.remote.client import redacted
from gtalign_jax.serving.server.ask import ApiError

LONGEST = 1_000_000  # bytes of an event


async def events(
    client: openai.AsyncOpenAI, chat: bool, body: Mapping[str, Any]
) -> AsyncGenerator[dict[str, Any]]:
    """Every event of one streamed completion, up to [DONE] or its end without; ApiError where it fails."""
    create: Any = client.chat.completions if chat else client.completions
    known = {name: body[name] for name in ("model", "messages" if chat else "prompt")}
    rest = {name: value for name, value in body.items() if name not in known and value is not None}
    try:
        async with create.with_streaming_response.create(**known, stream=True, extra_body=rest) as answer:
            async for line in _lines(answer):
                data = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:"):
                    continue  # an empty line, a comment, a name
                if data == b"[DONE]":
                    return
                yield _event(data)
    except openai.APIStatusError as error:
        raise _refused(error, client.api_key) from error
    except openai.APITimeoutError as error:
        raise ApiError(504, "the upstream does not answer", code="upstream") from error
    except openai.OpenAIError as error:
        raise ApiError(502, "the upstream cannot be reached", code="upstream", retry_s=5) from error
    except ApiError:
        raise
    except Exception as error:
        # Of the HTTP library that the client stands on, which differs between its versions.
        name = type(error).__name__
        status = 504 if "Timeout" in name else 502
        raise ApiError(status, f"the upstream broke off ({name})", code="upstream") from error


async def _lines(answer: Any) -> AsyncGenerator[bytes]:
    left = b""
    async with contextlib.aclosing(answer.iter_bytes()) as pieces:
        async for piece in pieces:
            *lines, left = (left + piece).split(b"\n")
            if len(left) > LONGEST:
                raise _garbage("an event without an end")
            for line in lines:
                yield line.rstrip(b"\r")


def _event(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _garbage("an event that is not JSON") from error
    if isinstance(event, dict) and "error" in event:
        raise ApiError(502, "the upstream failed in the middle of its answer", code="upstream")
    choices = event.get("choices") if isinstance(event, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise _garbage("an event without choices")
    return event


def _garbage(what: str) -> ApiError:
    return ApiError(502, f"the upstream sends what is no stream of completions: {what}", code="upstream")


def _refused(error: openai.APIStatusError, key: str) -> ApiError:
    """Its refusal as ours: the request's fault stays that, its own and our key's are a bad gateway."""
    status = error.response.status_code
    if status == 429:
        return ApiError(429, "the upstream has enough to do; come again", code="busy", retry_s=1)
    body = error.body if isinstance(error.body, dict) else {}
    reason = str(body.get("message") or body.get("detail") or "")  # the protocol's, or FastAPI's
    said = redacted(" ".join(reason.split()), [key])[:300]
    if status in (400, 404, 413, 422):
        return ApiError(status, f"the upstream refuses the request: {said or status}", code="upstream")
    return ApiError(502, f"the upstream answers with status {status}", code="upstream")
