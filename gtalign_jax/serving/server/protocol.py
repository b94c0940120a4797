"""A request of the OpenAI protocol read from JSON.

A field is taken as the protocol means it or refused by name; none is ignored, but those that only label a
request. Ours come in the extra body: `pricing`, `analyze`, `reasoning` and `unusable`.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from gtalign_jax.errors import UserError
from gtalign_jax.serving.server.ask import ApiError, Ask, Bounds, Defaults
from gtalign_jax.serving.server.fields import (
    FIELDS,
    kind,
    read_go_on,
    read_logprobs,
    read_messages,
    read_prompts,
    read_tokens,
)
from gtalign_jax.serving.server.text import SHOWN
from gtalign_jax.serving.splice import AGAIN

# They change nothing in what is written here.
LABELS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
# What the protocol has and we do not: asked for only when it differs from this.
ABSENT: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1, None),
    "frequency_penalty": (0, None),
    "function_call": (None,),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "presence_penalty": (0, None),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
}
_OF_CHATS = {"max_completion_tokens", "top_logprobs", "continue_final_message", "add_generation_prompt"}


def parse_json(body: bytes) -> dict[str, Any]:
    """A body as a JSON object. NaN, infinities and half surrogate pairs are no JSON."""

    def no_number(text: str) -> float:
        raise ValueError(f"{text} is not a number of JSON")

    try:
        found = json.loads(body.decode("utf-8"), parse_constant=no_number)
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ApiError(400, "the body holds half a surrogate pair, which is no text") from error
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ApiError(400, f"the body must be a JSON object, not {kind(found)}")
    return found


def read_defaults(value: Mapping[str, Any], bounds: Bounds) -> Defaults:
    """The defaults of a key; UserError names the field."""
    try:
        names = [field.name for field in dataclasses.fields(Defaults)]
        return Defaults(**{name: FIELDS[name](name, value[name], bounds) for name in names if name in value})
    except ApiError as error:
        raise UserError(error.message) from error


def read_ask(body: Mapping[str, Any], chat: bool, defaults: Defaults, bounds: Bounds) -> Ask:
    """The request in a body; every field is checked before anything is computed."""
    _check_known(body, chat)
    given = {name: value for name, value in body.items() if value is not None}
    found = {name: read(name, given[name], bounds) for name, read in FIELDS.items() if name in given}
    if chat and "max_tokens" not in given and "max_completion_tokens" in given:
        found["max_tokens"] = read_tokens("max_completion_tokens", given["max_completion_tokens"], bounds)
    go_on = chat and read_go_on(body, bounds)
    unsaid = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(Defaults)}
    ask = Ask(
        **{
            **unsaid,
            "unusable": defaults.unusable or bounds.unusable[0],
            **{"usage" if name == "stream_options" else name: value for name, value in found.items()},
            "chat": chat,
            "prompts": read_messages(body, go_on) if chat else read_prompts(body.get("prompt")),
            "go_on": go_on,
            **read_logprobs(body, chat, bounds),
        }
    )
    _check_together(ask, given, bounds)
    return ask


def _check_known(body: Mapping[str, Any], chat: bool) -> None:
    known = {"messages" if chat else "prompt", "logprobs", *FIELDS, *LABELS, *ABSENT}
    known |= _OF_CHATS if chat else set()
    for name in body:
        if name not in known:
            said = f"{json.dumps(name[:80])}: no such field here"
            raise ApiError(400, said, param=name[:80], code="unknown_parameter")
    for name, neutral in ABSENT.items():
        if name in body and body[name] not in neutral:
            raise ApiError(400, f"{name}: not supported here; leave it out", param=name, code="unsupported")


def _check_together(ask: Ask, given: Mapping[str, Any], bounds: Bounds) -> None:
    """ApiError for fields each of which is right, and wrong beside another."""
    priced, whole = ask.pricing is not None, ask.reasoning == SHOWN
    refused = (
        (
            len(ask.prompts) * ask.n > bounds.choices,
            "n",
            f"{len(ask.prompts)} prompts × n={ask.n}: at most {bounds.choices} answers a request",
        ),
        ("analyze" in given and not priced, "analyze", "needs a pricing, whose matrix is analyzed"),
        ("unusable" in given and not priced, "unusable", "needs a pricing, whose matrix is read"),
        (
            given.get("unusable") == AGAIN and ask.temperature == 0,
            "unusable",
            "again: a greedy second try is the first one; set a temperature",
        ),
        (
            ask.logprobs and not whole,
            "logprobs",
            f"not with reasoning={ask.reasoning}, which they would show",
        ),
        (ask.logprobs and priced, "logprobs", "not of a priced answer, parts of which nobody drew"),
        (ask.echo and ask.chat, "echo", "of /v1/completions alone"),
        (
            ask.echo and (priced or not whole),
            "echo",
            "shows a prompt before an answer as it is written; leave out pricing and reasoning",
        ),
        (
            ask.max_tokens == 0 and not ask.echo,
            "max_tokens",
            f"must be a whole number from 1 to {bounds.tokens}; 0 with echo, for the prompt alone",
        ),
        (
            ask.go_on and (priced or not whole),
            "continue_final_message",
            "an answer that was begun is gone on with as it is; leave out pricing and reasoning",
        ),
    )
    for wrong, name, said in refused:
        if wrong:
            raise ApiError(400, f"{name}: {said}", param=name)
