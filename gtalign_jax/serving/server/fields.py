"""The fields of the OpenAI protocol, one at a time: what a value means, or an `ApiError` that names it."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from gtalign_jax.chain.matrix import Row, parse_row
from gtalign_jax.rollout.continuous import PROMPT_TOP, TOP
from gtalign_jax.serving.server.ask import ApiError, Bounds, Messages, Pricing, Prompt
from gtalign_jax.serving.server.text import MODES
from gtalign_jax.serving.splice import ANALYZE

MAX_STOPS, MAX_STOP_CHARS = 4, 256
MAX_SEED = 2**63 - 1
MAX_PRICE = 1e6  # payoffs are from -5 to 5


def kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _wrong(name: str, value: Any, needed: str) -> ApiError:
    shown = json.dumps(value) if isinstance(value, int | float) and abs(value) < 1e15 else kind(value)
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


def read_tokens(name: str, value: Any, bounds: Bounds) -> int:
    return _whole(1, bounds.tokens)(name, value, bounds)


def _max_tokens(name: str, value: Any, bounds: Bounds) -> int:
    """As `read_tokens`, or 0, which only an echo may ask for."""
    return _whole(0, bounds.tokens)(name, value, bounds)


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
    """`{"policy": …, "price": …}`, perhaps with a `matrix`, as a request or a key's defaults hold it."""
    if not isinstance(value, dict) or not set(value) <= {"policy", "price", "matrix"}:
        raise ApiError(400, f'{name}: must be {{"policy": "per_token", "price": 0.5}}', param=name)
    policy = _one_of(*bounds.policies)(f"{name}.policy", value.get("policy"), bounds)
    price = value.get("price")
    number = isinstance(price, int | float) and not isinstance(price, bool)
    if price is None or not number or not math.isfinite(price) or abs(price) > MAX_PRICE:
        raise ApiError(
            400, f"{name}.price: must be a finite number, {MAX_PRICE:g} at most", param=f"{name}.price"
        )
    matrix = value.get("matrix")
    row = None if matrix is None else _read_matrix(f"{name}.matrix", matrix)
    return Pricing(policy, float(price), bounds.amounts, row, bounds.step)


def _read_matrix(name: str, value: Any) -> Row:
    """A payoff matrix as models write it."""
    row, errors = parse_row(json.dumps(value))
    if row is None:
        raise ApiError(400, errors[0].replace("payoff", name, 1), param=name)
    return row


def _unusable(name: str, value: Any, bounds: Bounds) -> str:
    return _one_of(*bounds.unusable)(name, value, bounds)


FIELDS: dict[str, Callable[[str, Any, Bounds], Any]] = {
    "model": _text,
    "n": _whole(1, 128),
    "max_tokens": _max_tokens,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, above=True),
    "stop": _stops,
    "seed": _whole(-MAX_SEED - 1, MAX_SEED),
    "stream": _flag,
    "echo": _flag,
    "stream_options": _stream_options,
    "pricing": read_pricing,
    "analyze": _one_of(*ANALYZE),
    "reasoning": _one_of(*MODES),
    "unusable": _unusable,
}


def read_logprobs(body: Mapping[str, Any], chat: bool, bounds: Bounds) -> dict[str, Any]:
    """`logprobs` and `top` of an `Ask`: whether tokens come with theirs, and with how many likely ones.

    A chat says both apart; of a text, `logprobs` is the number.
    """
    value, top = body.get("logprobs"), body.get("top_logprobs")
    if not chat:
        if value is None or value is False:
            return {}
        return {"logprobs": True, "top": _whole(0, PROMPT_TOP)("logprobs", value, bounds)}
    logprobs = value is not None and _flag("logprobs", value, bounds)
    if top is not None and not logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs=true", param="top_logprobs")
    return {"logprobs": logprobs, "top": _whole(0, TOP)("top_logprobs", 0 if top is None else top, bounds)}


def read_go_on(body: Mapping[str, Any], bounds: Bounds) -> bool:
    """Whether the last message is to be gone on with; as vLLM and SGLang have it, not OpenAI."""
    go_on = _flag("continue_final_message", body.get("continue_final_message", False), bounds)
    if _flag("add_generation_prompt", body.get("add_generation_prompt", not go_on), bounds) == go_on:
        said = "add_generation_prompt: must be false with continue_final_message, and true without"
        raise ApiError(400, said, param="add_generation_prompt")
    return go_on


def read_messages(body: Mapping[str, Any], go_on: bool) -> tuple[Messages]:
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


def read_prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str) or _ids(value):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(p, str) or _ids(p) for p in value):
        raise ApiError(400, "prompt: must be text, token ids, or a list of those", param="prompt")
    return tuple(p if isinstance(p, str) else tuple(p) for p in value)


def _ids(value: Any) -> bool:
    ids = isinstance(value, list) and bool(value)
    return ids and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
