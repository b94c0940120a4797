"""The steering curve: action mix, welfare, length and cost against the price, with intervals over prompts."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gtalign_jax.evaluation.bootstrap import MIN_PROMPTS, Estimate, bootstrap_means
from gtalign_jax.evaluation.report.figures import quiet, save_svg
from gtalign_jax.game.moves import ACTIONS

COLORS = dict(zip(ACTIONS, ("#4a4f9c", "#b0701a", "#23797c"), strict=True))
MARKS = dict(zip(ACTIONS, "os^", strict=True))
SHARES = ("steered", *ACTIONS, "follows", "obeys")
MEANS = ("welfare", "n_tokens", "cost")
Curve = dict[str | float, dict[str, Estimate]]


def steering_curve(lines: Sequence[Mapping[str, Any]]) -> Curve:
    """{point: {column: estimate}} of the lines that `serving.sweep` makes, in their order.

    steered: share of prompts with an edited matrix. Of those, DA, CQ, AQ: the share that said so; follows:
    the share that said what the matrix recommends; obeys: whose response did what was said; welfare,
    n_tokens, cost: means where there is one.
    """
    points: dict[str | float, list[Mapping[str, Any]]] = {}
    for line in lines:
        points.setdefault(line["at"], []).append(line)
    curve = {}
    for point, found in points.items():
        values = np.array([_columns(line) for line in found], np.float64)
        estimates = bootstrap_means(values, clusters=[line["id"] for line in found])
        curve[point] = dict(zip((*SHARES, *MEANS), estimates, strict=True))
    return curve


def _columns(line: Mapping[str, Any]) -> list[float]:
    """One row of the table; NaN is missing, and a point that a matrix does not have counts nowhere."""
    if line.get("failure") is not None:
        return [0.0] + [float("nan")] * (len(SHARES) + len(MEANS) - 1)
    if line["price"] is None:
        return [float("nan")] * (len(SHARES) + len(MEANS))
    said = [float(line["action"] == action) for action in ACTIONS]
    means = [float("nan") if line[name] is None else float(line[name]) for name in MEANS]
    return [1.0, *said, float(line["follows"]), float(line["obeys"]), *means]


def format_curve(curve: Curve) -> str:
    """The table as text, a row a point."""
    columns = (*SHARES, *MEANS)
    rows = [["price", *columns]]
    rows += [[_name(point), *(_cell(row[name]) for name in columns)] for point, row in curve.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    fewest = min((int(row["steered"]["clusters"]) for row in curve.values()), default=0)
    if fewest < MIN_PROMPTS:
        lines.append(f"Fewer than {MIN_PROMPTS} prompts ({fewest}): these intervals are too narrow.")
    return "\n".join(lines)


def save_curve(curve: Curve, path: pathlib.Path) -> None:
    """The curve over the points that are prices, as SVG: action mix, welfare, length and cost."""
    prices = [point for point in curve if not isinstance(point, str)]
    figure = Figure(figsize=(12.6, 2.9), layout="constrained")
    panels = (("share of answers", ACTIONS), *((name, (name,)) for name in MEANS))
    for ax, (title, names) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            mean, lo, hi = (np.array([curve[p][name][key] for p in prices]) for key in ("mean", "lo", "hi"))
            color = COLORS.get(name, "#4a4f9c")
            ax.plot(prices, mean, color=color, marker=MARKS.get(name, "o"), markersize=4, label=name)
            ax.fill_between(prices, lo, hi, color=color, alpha=0.15, linewidth=0)
        if len(names) > 1:
            ax.legend(frameon=False, fontsize=8)
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlabel("price", fontsize=8)
        quiet(ax)
    save_svg(figure, path)


def _name(point: str | float) -> str:
    return point if isinstance(point, str) else f"{point:g}"


def _cell(e: Estimate) -> str:
    if e["n"] == 0:
        return "-"
    digits = 2 if abs(e["mean"]) < 10 else 1
    return f"{e['mean']:.{digits}f} [{e['lo']:.{digits}f}, {e['hi']:.{digits}f}]"
