"""The JSON files of a model folder: objects, whose fields have the type and range that is due.

A null stands for a field that is not there, as transformers writes it.
"""

import logging
import math
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from gtalign_jax import jsonl
from gtalign_jax.errors import MAX_COUNT, UserError

log = logging.getLogger(__name__)

MUST = object()  # the default of a field that must be there
Fields = Mapping[str, Any]


def read_fields(path: pathlib.Path) -> dict[str, Any]:
    """The object of a JSON file, {} when there is no such file; UserError when it is something else."""
    return jsonl.read_object(path) if path.exists() else {}


def size(fields: Fields, name: str, where: str, default: Any = MUST, least: int = 1) -> Any:
    """A whole number of at least `least`; `default` where there is none."""
    value = _given(fields, name, where, default)
    if value is default:
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_COUNT:
        raise UserError(f"{where}: {name}={value!r} must be a whole number from {least} to {MAX_COUNT}")
    return value


def number(fields: Fields, name: str, where: str, default: Any = MUST) -> Any:
    """A finite number above 0; `default` where there is none."""
    value = _given(fields, name, where, default)
    if value is default:
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise UserError(f"{where}: {name}={value!r} must be a finite number above 0")
    return float(value)


def truth(fields: Fields, name: str, where: str, default: bool) -> bool:
    """true or false."""
    value = _given(fields, name, where, default)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {name}={value!r} must be true or false")
    return value


def choice(fields: Fields, name: str, where: str, known: Collection[str], default: Any = MUST) -> Any:
    """One of some texts; `default` where there is none."""
    value = _given(fields, name, where, default)
    if value is not default and value not in list(known):
        raise UserError(f"{where}: {name} {value!r} is not supported; use one of {', '.join(known)}")
    return value


def nested(fields: Fields, name: str, where: str) -> dict[str, Any]:
    """An object; {} where there is none."""
    value = _given(fields, name, where, {})
    if not isinstance(value, dict):
        raise UserError(f"{where}: {name} must be an object, not {value!r}")
    return value


def token_ids(fields: Fields, name: str, where: str, vocab_size: int) -> tuple[int, ...]:
    """One id or a list of them, () where there is none; UserError for one that the model does not have."""
    value = _given(fields, name, where, [])
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise UserError(f"{where}: {name}={value!r} must be ids of tokens from 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


def warn_of_metadata(names: Collection[str], where: str) -> None:
    """One line about the fields that nothing here or in transformers computes with."""
    if names:
        log.warning("%s: kept and not read: %s", where, ", ".join(sorted(names)))


def _given(fields: Fields, name: str, where: str, default: Any) -> Any:
    value = fields.get(name)
    if value is None and default is MUST:
        raise UserError(f"{where}: {name} is missing")
    return default if value is None else value
