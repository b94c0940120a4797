"""An event of another server's stream as a part of an answer, or an `ApiError` where it is none."""

import itertools
import math
from typing import Any

from gtalign_jax.serving.server.ask import ApiError
from gtalign_jax.serving.server.parts import Part, Said, Token, Usage
from gtalign_jax.serving.server.scheduler import LENGTH, STOP


def read_part(event: dict[str, Any], chat: bool, at: int) -> tuple[Part, str | None]:
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
        told = _chat_tokens(logprobs) if chat else _text_tokens(logprobs)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ApiError(502, "the upstream's logprobs have another form", code="upstream") from error
    found = []
    for token, likely in told:
        found.append(Said(token.text, token.bytes, token.logp, at, likely))
        at += len(token.text)
    return tuple(found)


def _chat_tokens(logprobs: dict[str, Any]) -> list[tuple[Token, tuple[Token, ...]]]:
    def token(one: dict[str, Any]) -> Token:
        return _token(one["token"], one["logprob"], one.get("bytes"))

    told = logprobs.get("content") or ()
    return [(token(one), tuple(map(token, one.get("top_logprobs") or ()))) for one in told]


def _text_tokens(logprobs: dict[str, Any]) -> list[tuple[Token, tuple[Token, ...]]]:
    logps = [math.nan if logp is None else logp for logp in logprobs["token_logprobs"]]
    tokens = list(itertools.starmap(_token, zip(logprobs["tokens"], logps, strict=True)))
    likely = logprobs.get("top_logprobs") or [{}] * len(tokens)
    ranked = [sorted(itertools.starmap(_token, (one or {}).items()), key=lambda t: -t.logp) for one in likely]
    return [(token, tuple(others)) for token, others in zip(tokens, ranked, strict=True)]


def _token(text: str, logp: float | None, found: list[int] | None = None) -> Token:
    return Token(
        text,
        tuple(text.encode() if found is None else bytes(found)),
        -math.inf if logp is None else float(logp),
    )
