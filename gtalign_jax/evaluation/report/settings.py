"""The configs of runs as pages show them: in groups, and where several of them differ."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gtalign_jax.remote.client import redacted_value


def groups(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The config as groups of (key, value) lines; values outside a group come first, as `run`."""
    loose = {k: v for k, v in config.items() if not isinstance(v, Mapping)}
    sections = {"run": loose} | {k: v for k, v in config.items() if isinstance(v, Mapping)}
    return [(name, list(_flat(section).items())) for name, section in sections.items() if section]


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str | None]]]:
    """(field, its value in each config) of the fields that differ; None where a config lacks the field."""
    values = [_flat(config) for config in configs]
    fields = dict.fromkeys(field for config in values for field in config)
    rows = [(field, [config.get(field) for config in values]) for field in fields]
    return [(field, row) for field, row in rows if len(set(row)) > 1]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted field to its value as JSON; a run of before may have recorded credentials in a URL."""
    rows: dict[str, str] = {}
    for key, inner in config.items():
        if isinstance(inner, Mapping):
            rows |= _flat(inner, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = json.dumps(redacted_value(inner), ensure_ascii=False)
    return rows
