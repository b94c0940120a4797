"""The report's curves and Pareto scatter as PNG files, for papers and slides."""

import pathlib
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gtalign_jax.evaluation.report.curves import Cloud, Panel, thin_points
from gtalign_jax.files import drafts

COLORS = {
    "user": "#23797c",
    "llm": "#b0701a",
    "welfare": "#4a4f9c",
    "neutral": "#6f7780",
    "base": "#8f959c",
    "middle": "#23797c",
    "aligned": "#4a4f9c",
}


def save_figures(
    folder: pathlib.Path, panels: Sequence[Panel], clouds: Sequence[Cloud], roles: Sequence[str]
) -> list[pathlib.Path]:
    """Write curves.png and pareto.png, as far as there is data; returns what was written."""
    written = []
    if panels:
        written.append(_save(_curves(panels), folder / "curves.png"))
    if clouds:
        written.append(_save(_pareto(clouds, roles), folder / "pareto.png"))
    return written


def _save(figure: Figure, path: pathlib.Path) -> pathlib.Path:
    with drafts.file(path, "wb") as sink:
        figure.savefig(sink, dpi=150, format="png")
    return path


def _curves(panels: Sequence[Panel]) -> Figure:
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, panel in zip(axes, panels, strict=False):
        for s in panel.series:
            ax.plot(s.x, s.y, color=COLORS[s.role], alpha=0.25, linewidth=0.8)
            ax.plot(s.x, s.smooth, color=COLORS[s.role], linewidth=1.6, label=s.name)
        if len(panel.series) > 1:
            ax.legend(frameon=False, fontsize=8)
        ax.set_title(panel.title, fontsize=10, loc="left")
        ax.set_xlabel("step", fontsize=8)
        ax.set_ylabel(panel.unit, fontsize=8)
        quiet(ax)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    return figure


def _pareto(clouds: Sequence[Cloud], roles: Sequence[str]) -> Figure:
    figure = Figure(figsize=(5.6, 5.0), layout="constrained")
    ax = figure.subplots()
    for cloud, role in zip(clouds, roles, strict=True):
        color = COLORS[role]
        dots = thin_points(cloud.points, 2000)
        ax.scatter(dots[:, 0], dots[:, 1], s=7, color=color, alpha=0.35, linewidths=0)
        ax.step(cloud.frontier[:, 0], cloud.frontier[:, 1], where="pre", color=color, linewidth=1.4)
        ax.scatter(
            cloud.mean[0], cloud.mean[1], s=70, color=color, edgecolors="white", label=cloud.model, zorder=3
        )
    ax.set_xlabel("user reward U")
    ax.set_ylabel("assistant reward L")
    ax.legend(frameon=False)
    quiet(ax)
    return figure


def quiet(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    ax.grid(axis="y", color="#e6e3dc", linewidth=0.7)
    ax.set_axisbelow(True)
