"""The config of a run as it stands in its work directory: written once, refused when it is another's."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_collections

from gtalign_jax import config as config_lib
from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.mesh import processes
from gtalign_jax.remote.client import redacted_value

# Section → fields that runs once recorded, that nothing was read from, and that no longer exist.
RETIRED = {"model": ("attention", "decode_layout", "param_dtype")}
# Section → fields that runs of before do not have, with the value they then had or have now.
ADDED = {
    "engine": {"patience_s": 300.0},
    "health": {"gap_limit": 0.02, "gap_growth": 100.0, "sft_growth": 2.0},
}


def check_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Refuse a workdir that holds another run, before anything in it is touched."""
    path = workdir / "config.json"
    if path.is_file():
        now = json.loads(config_lib.to_json(config))
        for field in _differences(_recorded(path), now):
            raise UserError(
                f"{path}: holds a run with another {field}; name a new --workdir or remove this one"
            )


def write_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Record the config of a run, once: one that goes on keeps what it recorded (`check_config`)."""
    path = workdir / "config.json"
    if processes.is_main() and not path.is_file():
        jsonl.write_atomic(path, config_lib.to_json(config))


def _recorded(path: pathlib.Path) -> dict[str, Any]:
    """The fields of a `config.json`, without those of RETIRED and with those of ADDED."""
    config = jsonl.read_object(path)
    for section, fields in RETIRED.items():
        for field in fields:
            config.get(section, {}).pop(field, None)
    for section, values in ADDED.items():
        if section in config:
            config[section] = values | config[section]
    return config


def _differences(old: dict, new: dict, prefix: str = "config") -> Iterator[str]:
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}.{key}")
        elif a != b:
            yield f"{prefix}.{key} ({redacted_value(a)!r}, now {redacted_value(b)!r})"


def read_config_json(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The config a run was started with."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; this is no work directory of a run")
    return ml_collections.ConfigDict(_recorded(path))
