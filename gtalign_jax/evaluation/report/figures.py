"""The report's charts, drawn once: as SVG in the page, and as PNG files for papers and slides.

A role (`user`, `aligned`, `run3`) has a colour and a dash pattern, so that lines are told apart by the colour
blind and on grey paper.
"""

import html
import io
import json
import pathlib
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gtalign_jax.evaluation.report.curves import Cloud, Panel, Series, thin_points
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
# Okabe and Ito's colours, the light ones darkened to be seen on paper.
_RUN_COLORS = ("#0072b2", "#d55e00", "#009e73", "#b8578d", "#b27b00", "#3d9fd3", "#20252b")
# Lengths of ink and gap, in widths of the line; 7 colours and 4 of these give 28 lines.
_RUN_DASHES = ((), (4.0, 1.6), (1.0, 1.6), (6.0, 1.6, 1.0, 1.6))
DASHES: dict[str, tuple[float, ...]] = {"user": (4.0, 1.6), "llm": (1.0, 1.6)}
RUN_ROLES = tuple(f"run{i}" for i in range(len(_RUN_COLORS) * len(_RUN_DASHES)))
COLORS |= {role: _RUN_COLORS[i % len(_RUN_COLORS)] for i, role in enumerate(RUN_ROLES)}
DASHES |= {role: _RUN_DASHES[i % len(_RUN_DASHES)] for i, role in enumerate(RUN_ROLES)}

_SOFT, _FAINT, _RULE, _CARD = "#5d656e", "#8d949b", "#e6e3dc", "#ffffff"
# What the page's style sheet calls a colour; it has another value for each of them in the dark.
_ON_PAGE = {color: f"var(--{role})" for role, color in reversed(COLORS.items())} | {
    _SOFT: "var(--soft)",
    _FAINT: "var(--faint)",
    _RULE: "var(--rule)",
    _CARD: "var(--card)",
}
_STYLE = {
    "svg.fonttype": "none",  # text stays text; the style sheet chooses its font
    "axes.labelcolor": _SOFT,
    "text.color": _SOFT,
    "axes.edgecolor": _FAINT,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
}
_WIDTH, _HEIGHT = 272, 173  # of a panel in the page, in its own units


def save_figures(
    folder: pathlib.Path, panels: Sequence[Panel], clouds: Sequence[Cloud], roles: Sequence[str]
) -> list[pathlib.Path]:
    """Write curves.png and pareto.png, as far as there is data; returns what was written."""
    written = []
    if panels:
        written.append(_save(_curves(panels), folder / "curves.png"))
    if clouds:
        figure = Figure(figsize=(5.6, 5.0), layout="constrained")
        _draw_clouds(figure.subplots(), clouds, roles, max_points=2000)
        written.append(_save(figure, folder / "pareto.png"))
    return written


def _save(figure: Figure, path: pathlib.Path) -> pathlib.Path:
    with drafts.file(path, "wb") as sink:
        figure.savefig(sink, dpi=150, format="png")
    return path


def save_svg(figure: Figure, path: pathlib.Path) -> None:
    """Write a figure of its own: its text stays text, and the same figure has the same bytes."""
    style = {"svg.fonttype": "none", "svg.hashsalt": path.name}
    with matplotlib.rc_context(style), drafts.file(path, "wb") as sink:
        figure.savefig(sink, format="svg", metadata={"Date": None})


def _curves(panels: Sequence[Panel]) -> Figure:
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, panel in zip(axes, panels, strict=False):
        _draw_panel(ax, panel, named=True)
        ax.set_title(panel.title, fontsize=10, loc="left")
        ax.set_ylabel(panel.unit, fontsize=8)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    return figure


def panel_svg(panel: Panel, named: bool = True) -> str:
    """A panel for the page, with what is shown under the pointer as an attribute.

    named: a legend stands in it, and its lines are also drawn as recorded; without, smoothed ones alone.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72, layout="constrained")
        ax = figure.subplots()
        _draw_panel(ax, panel, named)
        svg = _inline(figure, f"{panel.title}, {panel.unit}, by step of {panel.phase}")
    data = json.dumps([_readout(ax, s) for s in panel.series], separators=(",", ":"))
    return svg.replace("<svg ", f'<svg data-chart="{html.escape(data)}" ', 1)


def _readout(ax: Axes, s: Series) -> dict[str, object]:
    """A drawn line's name and, point by point, pixels from the left and top, step and value."""
    at = ax.transData.transform(np.stack([s.x, s.smooth], axis=1))
    values = [float(f"{v:.4g}") for v in s.smooth]
    x, y = at[:, 0].round(1).tolist(), (_HEIGHT - at[:, 1]).round(1).tolist()
    return {"name": s.name, "x": x, "y": y, "step": s.x.round().tolist(), "value": values}


def clouds_svg(clouds: Sequence[Cloud], roles: Sequence[str]) -> str:
    """The Pareto scatter for the page."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(400 / 72, 350 / 72), dpi=72, layout="constrained")
        _draw_clouds(figure.subplots(), clouds, roles, max_points=700)
        return _inline(figure, "Completions by user and assistant reward")


def _inline(figure: Figure, label: str) -> str:
    """A figure as an SVG element of a page: without ids but those it refers to, in the page's colours."""
    sink = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):  # the ids of two figures are two
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    width, height = (72 * size for size in figure.get_size_inches())
    inside = sink.getvalue().partition("</metadata>")[2].rpartition("</svg>")[0]
    inside = re.sub(r"<!--.*?-->\n?", "", re.sub(r'<g id="[^"]*">', "<g>", inside))
    inside = re.sub(r"#[0-9a-f]{6}\b", lambda found: _ON_PAGE.get(found[0], found[0]), inside)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(label)}">{inside}</svg>'
    )


def swatch(role: str) -> dict[str, str]:
    """How a legend of the page draws a role's line, two pixels wide."""
    return {"color": _ON_PAGE[COLORS[role]], "dash": " ".join(f"{2 * part:g}" for part in DASHES[role])}


def _draw_panel(ax: Axes, panel: Panel, named: bool) -> None:
    """The lines of a panel; `named` as in `panel_svg`."""
    for s in panel.series:
        color, dash = COLORS[s.role], (0, DASHES.get(s.role) or None)
        if named:
            ax.plot(s.x, s.y, color=color, alpha=0.25, linewidth=0.8)
        alone = "o" if len(s.x) == 1 else ""
        ax.plot(s.x, s.smooth, color=color, linestyle=dash, marker=alone, linewidth=1.7, label=s.name)
    if named and len(panel.series) > 1:
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderpad": 0, "borderaxespad": 0.2}
        ax.legend(**above, ncols=3, frameon=False, fontsize=9, columnspacing=1.2)
    ax.set_xlabel(f"step of {panel.phase}", fontsize=9, loc="right")
    ax.margins(x=0.01)
    ax.locator_params(nbins=5)
    ax.ticklabel_format(useOffset=False)
    quiet(ax)


def _draw_clouds(ax: Axes, clouds: Sequence[Cloud], roles: Sequence[str], max_points: int) -> None:
    """Completions, each model's mean and the staircase of its frontier, and curves of equal welfare."""
    low_u, low_l = np.concatenate([cloud.points for cloud in clouds]).min(axis=0)
    for cloud, role in zip(clouds, roles, strict=True):
        color, mark = COLORS[role], {"base": "s", "middle": "^"}.get(role, "o")
        dots = thin_points(cloud.points, max_points)
        ax.scatter(dots[:, 0], dots[:, 1], s=12, marker=mark, color=color, alpha=0.35, linewidths=0)
        u, l = cloud.frontier.T  # noqa: E741 (the paper's letter)
        ax.step([u[0], *u, low_u], [low_l, *l, l[-1]], where="post", color=color, linewidth=1.3, alpha=0.7)
        ax.plot(*cloud.mean, mark, color=color, ms=9, mec=_CARD, zorder=4, label=cloud.model)
    _draw_welfare(ax)
    ax.set_xlabel("user reward U", fontsize=10, loc="right")
    ax.set_ylabel("assistant reward L", fontsize=10, loc="top")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=10)
    ax.locator_params(nbins=6)
    quiet(ax)


def _draw_welfare(ax: Axes) -> None:
    """Curves of equal W = sqrt(U L) over the axes as they stand, each with its value."""
    x, y = (np.linspace(*ends, 100) for ends in (ax.get_xlim(), ax.get_ylim()))
    welfare = np.sqrt(np.clip(x, 0, None) * np.clip(y, 0, None)[:, None])
    values = [w for w in MaxNLocator(6).tick_values(0.0, welfare.max()) if 0.0 < w < welfare.max()]
    lines = ax.contour(x, y, welfare, values, colors=_FAINT, linewidths=0.8, linestyles="dashed", zorder=0)
    ax.clabel(lines, fmt=lambda w: f"W {w:g}", fontsize=8)


def quiet(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    ax.grid(axis="y", color=_RULE, linewidth=0.7)
    ax.set_axisbelow(True)
