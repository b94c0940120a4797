"""What became of the paper's claims, and all tables with their figures, as Markdown of what is on disk."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from gtalign_jax import jsonl
from gtalign_jax.evaluation.paper.entries import ENTRIES, Entry


def claims(tables: pathlib.Path) -> str:
    """A line each claim whose table is there."""
    lines = ["| table | the paper's claim | here |", "|---|---|---|"]
    for entry in _made(tables):
        found: Mapping[str, Any] = jsonl.read_object(tables / f"{entry.name}.json")
        here = found["verdict"] or ("numbers alone" if found["rows"] else found["note"] or "no answers")
        lines.append(f"| {entry.name} | {entry.claim} | {here} |")
    return "\n".join([*lines, ""])


def page(tables: pathlib.Path, scale: str) -> str:
    """The claims, then every table that is there with its figure."""
    parts = [f"# The paper's tables at the scale `{scale}`", claims(tables).rstrip()]
    for entry in _made(tables):
        parts += [f"## {entry.name}", (tables / f"{entry.name}.md").read_text(encoding="utf-8").rstrip()]
        if (tables / f"{entry.name}.svg").is_file():
            parts.append(f"![{entry.name}]({entry.name}.svg)")
    return "\n\n".join([*parts, ""])


def _made(tables: pathlib.Path) -> Iterator[Entry]:
    """The entries whose tables are there, in the registry's order."""
    return (entry for name, entry in ENTRIES.items() if (tables / f"{name}.json").is_file())
