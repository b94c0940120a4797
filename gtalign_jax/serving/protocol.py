"""What a client of the OpenAI protocol asks for, read from JSON: an `Ask`, or an `ApiError` that says why.

A field is taken as the protocol means it or refused by name; none is ignored, but those that only label a
request. Ours come in the extra body: `pricing`, `analyze` and `reasoning`.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from gtalign_jax.errors import UserError
from gtalign_jax.serving.text import MODES, SHOWN

ANALYZE = MODEL, SOLVER = ("model", "solver")
MAX_STOPS, MAX_STOP_CHARS = 4, 256
MAX_SEED = 2**63 - 1
# They change nothing in what is written here.
LABELS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
# What the protocol has and we do not: asked for only when it differs from this.
ABSENT: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1, None),
    "echo": (False, None),
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
Messages = tuple[dict[str, str], ...]
Prompt = str | tuple[int, ...] | Messages


class ApiError(Exception):
    """An answer that is an error. status: HTTP's. param: the field at fault. retry_s: when to come again."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_s: int = 0,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code, self.retry_s = code, retry_s

    def body(self) -> dict[str, Any]:
        """The JSON that the protocol's clients read."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Pricing:
    """Who pays and how much: a policy of `game.pricing` and its price."""

    policy: str
    price: float


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing: of a key, or of the server."""

    pricing: Pricing | None = None
    analyze: str = MODEL
    reasoning: str = SHOWN


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The most that one request may ask for."""

    tokens: int
    choices: int
    policies: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request.

    prompts: each answered n times. max_tokens: None for all there is room for. go_on: the last message is the
    beginning of the answer. usage: streamed too. logprobs: of the tokens written.
    """

    chat: bool
    prompts: tuple[Prompt, ...]
    model: str | None = None
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    go_on: bool = False
    usage: bool = False
    logprobs: bool = False
    pricing: Pricing | None = None
    analyze: str = MODEL
    reasoning: str = SHOWN


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
        raise ApiError(400, f"the body must be a JSON object, not {_kind(found)}")
    return found


def read_ask(body: Mapping[str, Any], chat: bool, defaults: Defaults, bounds: Bounds) -> Ask:
    """The request in a body; every field is checked before anything is computed."""
    known = {"messages" if chat else "prompt", "logprobs", *_FIELDS, *LABELS, *ABSENT}
    known |= _OF_CHATS if chat else set()
    for name in body:
        if name not in known:
            raise ApiError(400, f"{name}: no such field here", param=name, code="unknown_parameter")
    for name, neutral in ABSENT.items():
        if name in body and body[name] not in neutral:
            raise ApiError(400, f"{name}: not supported here; leave it out", param=name, code="unsupported")
    found = {
        name: read(name, body[name], bounds) for name, read in _FIELDS.items() if body.get(name) is not None
    }
    found["stop"] = found.get("stop", ())
    if found.get("max_tokens") is None and chat and body.get("max_completion_tokens") is not None:
        found["max_tokens"] = _tokens("max_completion_tokens", body["max_completion_tokens"], bounds)
    usage = found.pop("stream_options", False)
    logprobs = _logprobs(body, chat)
    go_on = chat and _continues(body, bounds)
    prompts = _messages(body, go_on) if chat else _prompts(body.get("prompt"))
    n = found.get("n", 1)
    if len(prompts) * n > bounds.choices:
        said = f"{len(prompts)} prompts × n={n}: at most {bounds.choices} answers a request"
        raise ApiError(400, said, param="n")
    reasoning = found.get("reasoning", defaults.reasoning)
    if logprobs and reasoning != SHOWN:
        raise ApiError(
            400, f"logprobs: not with reasoning={reasoning}, which they would show", param="logprobs"
        )
    pricing = found.get("pricing", defaults.pricing)
    if go_on and (pricing is not None or reasoning != SHOWN):
        said = "continue_final_message: an answer that was begun is gone on with as it is; leave out ours"
        raise ApiError(400, said, param="continue_final_message")
    if logprobs and pricing is not None:
        raise ApiError(400, "logprobs: not of a priced answer, parts of which nobody drew", param="logprobs")
    held = {"pricing": defaults.pricing, "analyze": defaults.analyze, "reasoning": defaults.reasoning}
    made = {"chat": chat, "prompts": prompts, "go_on": go_on, "usage": usage, "logprobs": logprobs}
    return Ask(**{**held, **found, **made})


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _wrong(name: str, value: Any, needed: str) -> ApiError:
    shown = json.dumps(value) if isinstance(value, int | float) and abs(value) < 1e15 else _kind(value)
    return ApiError(400, f"{name}={shown}: must be {needed}", param=name)


def _flag(name: str, value: Any, bounds: Bounds) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _text(name: str, value: Any, bounds: Bounds) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "text")
    return value


def _whole(low: int, high: int) -> Callable[[str, Any, Bounds], int]:
    def read(name: str, value: Any, bounds: Bounds) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _wrong(name, value, f"a whole number from {low} to {high}")
        return value

    return read


def _number(low: float, high: float, above: bool = False) -> Callable[[str, Any, Bounds], float]:
    def read(name: str, value: Any, bounds: Bounds) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or (above and value == low):
            raise _wrong(
                name, value, f"a number {'above' if above else 'from'} {low:g} {'up ' * above}to {high:g}"
            )
        return float(value)

    return read


def _one_of(*choices: str) -> Callable[[str, Any, Bounds], str]:
    def read(name: str, value: Any, bounds: Bounds) -> str:
        if value not in choices:
            raise ApiError(400, f"{name}: must be one of {', '.join(choices)}", param=name)
        return value

    return read


def _tokens(name: str, value: Any, bounds: Bounds) -> int:
    return _whole(1, bounds.tokens)(name, value, bounds)


def _stops(name: str, value: Any, bounds: Bounds) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ApiError(400, f"{name}: must be text or a list of texts", param=name)
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        said = f"{name}: at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters"
        raise ApiError(400, said, param=name)
    return tuple(stops)


def _stream_options(name: str, value: Any, bounds: Bounds) -> bool:
    if not isinstance(value, dict) or not set(value) <= {"include_usage", "include_obfuscation"}:
        raise ApiError(400, f'{name}: must be {{"include_usage": true}}', param=name)
    return _flag(f"{name}.include_usage", value.get("include_usage", False), bounds)


def read_pricing(name: str, value: Any, bounds: Bounds) -> Pricing:
    """`{"policy": …, "price": …}` as a request or a key's defaults hold it."""
    if not isinstance(value, dict) or not set(value) <= {"policy", "price"}:
        raise ApiError(400, f'{name}: must be {{"policy": "per_token", "price": 0.5}}', param=name)
    policy = _one_of(*bounds.policies)(f"{name}.policy", value.get("policy"), bounds)
    price = value.get("price")
    number = isinstance(price, int | float) and not isinstance(price, bool)
    if price is None or not number or not math.isfinite(price) or abs(price) > MAX_PRICE:
        raise ApiError(
            400, f"{name}.price: must be a finite number, {MAX_PRICE:g} at most", param=f"{name}.price"
        )
    return Pricing(policy, float(price))


MAX_PRICE = 1e6  # payoffs are from -5 to 5
_FIELDS: dict[str, Callable[[str, Any, Bounds], Any]] = {
    "model": _text,
    "n": _whole(1, 128),
    "max_tokens": _tokens,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, above=True),
    "stop": _stops,
    "seed": _whole(-MAX_SEED - 1, MAX_SEED),
    "stream": _flag,
    "stream_options": _stream_options,
    "pricing": read_pricing,
    "analyze": _one_of(*ANALYZE),
    "reasoning": _one_of(*MODES),
}


def read_defaults(value: Mapping[str, Any], bounds: Bounds) -> Defaults:
    """The defaults of a key; UserError names the field."""
    try:
        names = [field.name for field in dataclasses.fields(Defaults)]
        return Defaults(**{name: _FIELDS[name](name, value[name], bounds) for name in names if name in value})
    except ApiError as error:
        raise UserError(error.message) from error


def _logprobs(body: Mapping[str, Any], chat: bool) -> bool:
    """Whether the tokens written are to come with theirs; those of other tokens are not kept."""
    value, others = body.get("logprobs"), body.get("top_logprobs")
    alone = "the log-probabilities of the tokens written are given, of no others"
    if chat:
        if others not in (None, 0):
            raise ApiError(400, f"top_logprobs: must be 0; {alone}", param="top_logprobs", code="unsupported")
        return value is not None and _flag("logprobs", value, Bounds(1, 1, ()))
    if value is None or value is False:
        return False
    if isinstance(value, bool) or value not in (0, 1):
        raise ApiError(400, f"logprobs: must be 0 or 1; {alone}", param="logprobs", code="unsupported")
    return True


def _continues(body: Mapping[str, Any], bounds: Bounds) -> bool:
    """Whether the last message is to be gone on with; as vLLM and SGLang have it, not OpenAI."""
    go_on = _flag("continue_final_message", body.get("continue_final_message", False), bounds)
    if _flag("add_generation_prompt", body.get("add_generation_prompt", not go_on), bounds) == go_on:
        said = "add_generation_prompt: must be false with continue_final_message, and true without"
        raise ApiError(400, said, param="add_generation_prompt")
    return go_on


def _messages(body: Mapping[str, Any], go_on: bool) -> tuple[Messages]:
    value = body.get("messages")
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages: must be a list of at least one message", param="messages")
    found = tuple(_message(f"messages[{i}]", one) for i, one in enumerate(value))
    if go_on and (len(found) < 2 or found[-1]["role"] != "assistant"):
        said = "continue_final_message: the last message must be the assistant's, after others"
        raise ApiError(400, said, param="messages")
    return (found,)


def _message(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ApiError(400, f"{name}: must be an object with role and content", param=name)
    role, content = value.get("role"), value.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise ApiError(400, f"{name}.role: must be system, user or assistant", param=f"{name}.role")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        texts = [p for p in parts if isinstance(p, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise ApiError(400, f"{name}.content: must be text", param=f"{name}.content")
    return {"role": "system" if role == "developer" else role, "content": content}


def _prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str) or _ids(value):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(p, str) or _ids(p) for p in value):
        raise ApiError(400, "prompt: must be text, token ids, or a list of those", param="prompt")
    return tuple(p if isinstance(p, str) else tuple(p) for p in value)


def _ids(value: Any) -> bool:
    ids = isinstance(value, list) and bool(value)
    return ids and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
