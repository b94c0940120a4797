"""The fields of a config, for `--help`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator

import ml_collections


def explain(config: ml_collections.ConfigDict | None = None) -> str:
    """Every field of a config, by default of `configs/base.py`, with its value, under what is said of its
    section."""
    from configs import base  # imported here: JAX starts only when it is asked for
    from gtalign_jax.run.settings import ALL_SECTIONS

    lines = []
    for name, value in (config or base.get_config()).items():
        lines += ["", *(_said(ALL_SECTIONS[name]) if name in ALL_SECTIONS else [])]
        lines += _fields(f"--config.{name}", value)
    return "\n".join(lines).strip()


def _said(section: type) -> list[str]:
    """The docstrings of a section's dataclass and of those that it adds to."""
    classes = [each for each in reversed(section.__mro__) if dataclasses.is_dataclass(each)]
    return [line for each in classes for line in (inspect.getdoc(each) or "").splitlines()]


def _fields(path: str, value: object) -> Iterator[str]:
    """`--config.SECTION.FIELD=VALUE` of every field, those of sections inside a section too."""
    if isinstance(value, ml_collections.ConfigDict):
        for name, inner in value.items():
            yield from _fields(f"{path}.{name}", inner)
    else:
        yield f"  {path}={value}"
