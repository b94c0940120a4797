"""Markdown tables of what the benchmarks printed.

    python -m experiments.bench_table FILE.jsonl [FILE.jsonl ...]

One table for each benchmark, unit and kind of case, with the columns its lines have. `spread` is the
largest distance between rounds of one contender, as a part of their median: what a ratio can be trusted to.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.files import paths

Line = Mapping[str, Any]


def spread(line: Line) -> float | None:
    """(max - min) / median of the rounds' seconds, the largest of the contenders; None for one round."""
    rounds = [taken for taken in line.get("seconds", {}).values() if len(taken) > 1]
    return max(((max(r) - min(r)) / statistics.median(r) for r in rounds), default=None)


def target(line: Line) -> str | None:
    """The bound on the ratio and whether it was met; a ratio of seconds is to stay below its bound."""
    bound, ratio = line.get("target"), line.get("ratio")
    if bound is None or ratio is None:
        return None
    below = str(line.get("unit", "")).endswith("s") and not str(line["unit"]).endswith("/s")
    met = ratio <= bound if below else ratio >= bound
    return f"{'≤' if below else '≥'} {bound}, {'met' if met else 'missed'}"


def number(value: Any) -> str:
    """A rate without decimals that mean nothing, and anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


# Heading -> text of a line's cell, None where the line has none; in the order of the columns.
COLUMNS: dict[str, Callable[[Line], str | None]] = {
    "case": lambda line: line["case"],
    "variant": lambda line: line.get("variant"),
    "peer": lambda line: line.get("peer_name"),
    "ours": lambda line: _number(line, "ours"),
    "the peer's": lambda line: _number(line, "peer"),
    "ratio": lambda line: None if line.get("ratio") is None else f"{line['ratio']:.2f}",
    "target": target,
    "products": lambda line: _number(line, "products"),
    "rest": lambda line: _number(line, "rest"),
    "limit": lambda line: _number(line, "limit"),
    "share of limit": lambda line: percent(line.get("share")),
    "spread": lambda line: percent(spread(line)),
    "tokens": lambda line: _number(line, "tokens"),
    "most memory, MiB": lambda line: " and ".join(map(number, line.get("peak_mib", {}).values())) or None,
    "weights": lambda line: _number(line, "weights"),
    "temporary": lambda line: _number(line, "temporary"),
    "beyond the gradient": lambda line: _number(line, "beyond_gradient"),
}


def _number(line: Line, key: str) -> str | None:
    return None if line.get(key) is None else number(line[key])


def section(line: Line) -> tuple[str, ...]:
    """What lines of one table have in common: its caption."""
    kind = line["case"] if line["case"] in ("growth", "memory") else ""
    where = f"{line.get('shape')} shape, {line.get('dtype')}, {line.get('device')}"
    return (
        f"bench_{line['bench']} {kind}".strip(),
        str(line.get("unit")),
        where,
        f"{line.get('allocator')} allocator",
    )


def table(lines: Sequence[Line]) -> str:
    """The lines under the columns that any of them fills."""
    cells = [{name: text(line) for name, text in COLUMNS.items()} for line in lines]
    used = [name for name in COLUMNS if any(row[name] is not None for row in cells)]
    rows = [used, ["---"] * len(used), *([row[name] or "" for name in used] for row in cells)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def render(lines: Sequence[Line]) -> str:
    """All tables, each under its caption, in the order of the lines."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault(section(line), []).append(line)
    return "\n\n".join(f"{', '.join(caption)}:\n\n{table(rows)}" for caption, rows in groups.items())


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    if not given or any(path.startswith("-") for path in given):
        raise UserError("give one or more files of benchmark lines: bench_table FILE.jsonl [FILE.jsonl ...]")
    lines = []
    for path in given:
        if not paths.path(path).is_file():
            raise UserError(f"{path}: not found; redirect a benchmark's stdout there first")
        lines += jsonl.read(path)
    for line in lines:
        if "bench" not in line or "case" not in line:
            raise UserError(
                f"a line without bench or case: {dict(line)}; give lines of bench_train, _step, _rollout"
            )
    print(render(lines))


if __name__ == "__main__":
    main()
