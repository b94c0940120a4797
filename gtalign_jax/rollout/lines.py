"""JSON lines of prompts and token rows, with errors that name the line."""

from collections.abc import Mapping, Sequence
from typing import Any

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.rollout.engine import Engine, encode, fits

PROMPT_FIELDS = ("prompt", "messages", "token_ids")


def read_lines(path: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, each with its number as `line`; UserErrors as of `jsonl.stream`."""
    return [{**fields, "line": number} for number, fields in jsonl.stream(path)]


def prompt_ids(engine: Engine, fields: Mapping[str, Any], path: str) -> list[int]:
    """Token ids of a prompt line, which holds one of `prompt`, `messages` and `token_ids`."""
    where = f"{path}:{fields['line']}"
    name, value = prompt_field(fields, where)
    if name == "token_ids":
        return token_ids(value, engine.model_config.vocab_size, where)
    return encode(engine, value)


def check_fits(engine: Engine, ids: Sequence[int], where: str) -> None:
    """UserError for a prompt that has no bucket, before anything is written for those before it."""
    if not fits(engine, ids):
        raise UserError(f"{where}: {len(ids)} tokens; a prompt holds 1 to {engine.buckets.prompt[-1]}")


def prompt_field(
    fields: Mapping[str, Any], where: str, allowed: Sequence[str] = PROMPT_FIELDS
) -> tuple[str, Any]:
    """(name, value) of the one field that holds a line's prompt, its texts checked."""
    given = [name for name in allowed if name in fields]
    if len(given) != 1:
        raise UserError(f"{where}: give one of {', '.join(allowed)}, got {given or 'none'}")
    value = fields[given[0]]
    is_messages = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    )
    if given[0] == "prompt" and not isinstance(value, str):
        raise UserError(f"{where}: prompt must be a string")
    if given[0] == "messages" and not (is_messages and value):
        raise UserError(f"{where}: messages must be a list of objects with role and content")
    if given[0] != "token_ids":
        for text in [value] if isinstance(value, str) else [part for m in value for part in m.values()]:
            check_text(text, f"{where}: {given[0]}")
    return given[0], value


def check_text(text: Any, where: str) -> None:
    """UserError where a text holds half a surrogate pair, which no tokenizer reads."""
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise UserError(f"{where} holds half a surrogate pair ({half}); mend or remove it") from error


def token_ids(value: Any, vocab_size: int, where: str) -> list[int]:
    """A non-empty list of token ids of this vocabulary."""
    ok = isinstance(value, list) and value
    if not ok or not all(type(i) is int and 0 <= i < vocab_size for i in value):
        raise UserError(f"{where}: token_ids must be a list of integers in [0, {vocab_size})")
    return value
