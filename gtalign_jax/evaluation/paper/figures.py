"""A table as a figure: points with their intervals, or the curves of the games."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gtalign_jax.evaluation.paper.entries import Entry
from gtalign_jax.evaluation.paper.games import studied
from gtalign_jax.evaluation.paper.tables import Table
from gtalign_jax.evaluation.report.figures import COLORS, quiet, save_svg


def save_table(entry: Entry, table: Table, path: pathlib.Path) -> None:
    """A panel a column, a row a method; ours is dark. SVG."""
    columns = list(dict.fromkeys(name for row in table.rows.values() for name in row))
    labels = list(table.rows)
    height = 0.9 + 0.28 * len(labels)
    figure = Figure(figsize=(1.6 + 2.1 * len(columns), height), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for ax, column in zip(panels, columns, strict=True):
        for y, label in enumerate(labels):
            if (found := table.rows[label].get(column)) is None:
                continue
            color = COLORS["aligned"] if label == entry.ours else COLORS["base"]
            ax.plot([found["lo"], found["hi"]], [y, y], color=color, linewidth=2, solid_capstyle="round")
            ax.plot(found["mean"], y, "o", color=color, markersize=5)
        ax.set_title(column, fontsize=9, loc="left")
        ax.set_yticks(range(len(labels)), labels, fontsize=8)
        ax.margins(x=0.12, y=0.15)
        quiet(ax)
    panels[0].invert_yaxis()  # shared: the first method stands at the top of all
    save_svg(figure, path)


def save_curves(curves: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
    """A panel a number of a game: every seed's curve, and the solution as a dashed line. SVG."""
    figure = Figure(figsize=(2.6 * len(curves), 2.6), layout="constrained")
    solutions = {one.name: one.solution for one in studied()}
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, (name, values) in zip(panels, curves.items(), strict=True):
        ax.plot(values.T, color=COLORS["aligned"], alpha=0.3, linewidth=0.8)
        ax.axhline(solutions[name], color=COLORS["llm"], linestyle="--", linewidth=1.2)
        ax.set_ylim(-0.05, 1.05)
        ax.set_title(name, fontsize=8, loc="left")
        ax.set_xlabel("update", fontsize=8)
        quiet(ax)
    save_svg(figure, path)


def save_training(
    runs: Mapping[str, Sequence[Mapping[str, float]]], metrics: Sequence[str], path: pathlib.Path
) -> None:
    """A panel a metric, a line a run METHOD_SEED, of one colour and dash a method. SVG.

    runs: what stands in the log of each step."""
    looks = itertools.cycle([("aligned", "-"), ("llm", "--"), ("user", ":"), ("neutral", "-.")])
    methods = dict(zip(dict.fromkeys(name.rpartition("_")[0] for name in runs), looks, strict=False))
    figure = Figure(figsize=(2.6 * len(metrics), 2.6), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for ax, metric in zip(panels, metrics, strict=True):
        for name, steps in runs.items():
            role, dash = methods[name.rpartition("_")[0]]
            points = [(step["step"], step[metric]) for step in steps if step.get(metric) is not None]
            x, y = zip(*points, strict=True) if points else ((), ())
            ax.plot(x, y, dash, color=COLORS[role], linewidth=1.0)
        ax.set_title(metric, fontsize=9, loc="left")
        ax.set_xlabel("step", fontsize=8)
        quiet(ax)
    lines = [Line2D([], [], color=COLORS[role], linestyle=dash) for role, dash in methods.values()]
    panels[0].legend(lines, list(methods), frameon=False, fontsize=8)
    save_svg(figure, path)
