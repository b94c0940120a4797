"""Charts as inline SVG text; colours come from the page's style sheet through class names."""

import html
import json
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from gtalign_jax.evaluation.bootstrap import Estimate
from gtalign_jax.evaluation.report.curves import Cloud, Panel, Series, thin_points

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 340, 216, 44, 10, 34


def ticks(lo: float, hi: float, wanted: int = 4) -> np.ndarray:
    """Round numbers within [lo, hi], about `wanted` of them."""
    span = max(hi - lo, 1e-12)
    power = 10.0 ** np.floor(np.log10(span / wanted))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= span / wanted - 1e-15)
    return np.arange(np.ceil(lo / step - 1e-9), np.floor(hi / step + 1e-9) + 1) * step


def number(value: float) -> str:
    """A number with three significant digits and no trailing zeros."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.3g}"


def padded(values: np.ndarray, share: float = 0.06) -> tuple[float, float]:
    """The range of the values, a little wider; never empty."""
    lo, hi = float(values.min()), float(values.max())
    pad = (hi - lo) * share or max(abs(hi) * 0.05, 0.01)
    return (0.0 if lo >= 0 and lo - pad < 0 else lo - pad), hi + pad


def _scale(lo: float, hi: float, start: float, stop: float) -> Callable[[npt.ArrayLike], np.ndarray]:
    return lambda v: start + (np.asarray(v, np.float64) - lo) / (hi - lo) * (stop - start)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _text(x: float, y: float, text: str, css: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{html.escape(text)}</text>'


def line_chart(panel: Panel) -> str:
    """A panel's lines: as recorded, faint, and smoothed; the names stand at the lines' ends."""
    right = WIDTH - (10 if len(panel.series) == 1 else 14 + 7 * max(len(s.name) for s in panel.series))
    x_lo, x_hi = min(s.x[0] for s in panel.series), max(s.x[-1] for s in panel.series)
    y_lo, y_hi = padded(np.concatenate([s.y for s in panel.series]))
    to_x = _scale(x_lo, max(x_hi, x_lo + 1), LEFT, right)
    to_y = _scale(y_lo, y_hi, HEIGHT - BOTTOM, TOP)
    parts = [_axes(to_x, to_y, ticks(x_lo, max(x_hi, x_lo + 1)), ticks(y_lo, y_hi), right, "step")]
    for s in panel.series:
        x = to_x(s.x)
        parts.append(f'<path class="line raw {s.role}" d="{_path(x, to_y(s.y))}"/>')
        parts.append(f'<path class="line {s.role}" d="{_path(x, to_y(s.smooth))}"/>')
    if len(panel.series) > 1:
        parts += _end_labels(panel.series, to_y, right + 5)
    parts.append(
        f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>'
    )
    return _figure("".join(parts), panel.title, _readout(panel, to_x))


def _readout(panel: Panel, to_x: Callable) -> str:
    """What the page shows under the pointer, as an attribute: pixel positions, steps and values."""
    data = [
        {
            "name": s.name,
            "x": to_x(s.x).round(1).tolist(),
            "step": s.x.round().tolist(),
            "y": s.smooth.tolist(),
        }
        for s in panel.series
    ]
    for line in data:
        line["y"] = [float(f"{v:.4g}") for v in line["y"]]
    return f' data-chart="{html.escape(json.dumps(data, separators=(",", ":")))}"'


def _figure(inside: str, label: str, attributes: str = "", size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    return (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{html.escape(label)}"{attributes}>'
        f"{inside}</svg>"
    )


def _axes(
    to_x: Callable,
    to_y: Callable,
    x_ticks: np.ndarray,
    y_ticks: np.ndarray,
    right: float,
    x_name: str,
    bottom: float = HEIGHT - BOTTOM,
) -> str:
    parts = []
    for v in y_ticks:
        y = float(to_y(v))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 3.5, number(v), "tick", "end"))
    for v in x_ticks:
        parts.append(_text(float(to_x(v)), bottom + 16, number(v), "tick", "middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(_text(right, bottom + 31, x_name, "tick name", "end"))
    return "".join(parts)


def _end_labels(series: Sequence[Series], to_y: Callable, x: float) -> list[str]:
    """Names at the lines' ends, pushed apart so that they can be read."""
    order = sorted(series, key=lambda s: float(to_y(s.smooth[-1])))
    parts, last = [], -np.inf
    for s in order:
        last = max(float(to_y(s.smooth[-1])) + 3.5, last + 12)
        parts.append(_text(x, last, s.name, f"end {s.role}", "start"))
    return parts


def scatter(clouds: Sequence[Cloud], roles: Sequence[str], max_points: int = 700) -> str:
    """Completions of several models in the (U, L) plane, their frontiers and curves of equal welfare."""
    width, height, top, right, bottom = 760, 440, 26, 706, 404
    everything = np.concatenate([c.points for c in clouds])
    corner = everything.min(0)
    (x_lo, x_hi), (y_lo, y_hi) = padded(everything[:, 0]), padded(everything[:, 1])
    to_x, to_y = _scale(x_lo, x_hi, LEFT, right), _scale(y_lo, y_hi, bottom, top)
    parts = [_axes(to_x, to_y, ticks(x_lo, x_hi), ticks(y_lo, y_hi), right, "user reward U", bottom)]
    parts.append(_text(LEFT, top - 10, "assistant reward L", "tick name", "start"))
    parts += _isowelfare((x_lo, x_hi), (y_lo, y_hi), to_x, to_y)
    for c, role in zip(clouds, roles, strict=True):
        dots = thin_points(c.points, max_points)
        places = zip(to_x(dots[:, 0]), to_y(dots[:, 1]), strict=True)
        circles = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8"/>' for x, y in places)
        parts.append(f'<g class="dots {role}">{circles}</g>')
        parts.append(f'<path class="line frontier {role}" d="{_steps(c.frontier, corner, to_x, to_y)}"/>')
    for c, role in zip(clouds, roles, strict=True):
        x, y = float(to_x(c.mean[0])), float(to_y(c.mean[1]))
        parts.append(f'<circle class="mean {role}" cx="{x:.1f}" cy="{y:.1f}" r="7"/>')
    return _figure("".join(parts), "Completions by user and assistant reward", size=(width, height))


def _steps(frontier: np.ndarray, corner: np.ndarray, to_x: Callable, to_y: Callable) -> str:
    """The staircase that bounds the region a frontier dominates."""
    u, l = frontier[:, 0], frontier[:, 1]  # noqa: E741 (the paper's letter)
    xs = np.concatenate([np.repeat(u, 2), [corner[0]]])
    ys = np.concatenate([[corner[1]], np.repeat(l, 2)])
    return _path(to_x(xs), to_y(ys))


def _isowelfare(
    x_range: tuple[float, float], y_range: tuple[float, float], to_x: Callable, to_y: Callable
) -> list[str]:
    """Curves of equal W = sqrt(U L), each with its value beside its end."""
    parts = []
    x_hi, y_hi = x_range[1], y_range[1]
    for w in ticks(0.0, np.sqrt(max(x_hi * y_hi, 1e-6)), 6)[1:]:
        u = np.geomspace(max(x_range[0], w * w / y_hi, 1e-6), x_hi, 48)
        y = w * w / u
        keep = (y >= y_range[0]) & (y <= y_hi + 1e-9)
        if keep.sum() < 2:
            continue
        px, py = to_x(u[keep]), to_y(y[keep])
        parts.append(f'<path class="iso" d="{_path(px, py)}"/>')
        parts.append(_text(px[-1] + 6, py[-1] + 3.5, f"W {number(w)}", "tick iso", "start"))
    return parts


def intervals(estimates: Sequence[Estimate | None], roles: Sequence[str], lo: float, hi: float) -> str:
    """A small row: each model's interval as a line and its mean as a dot, on the range [lo, hi]."""
    width, row = 220, 9
    to_x = _scale(lo, hi, 6, width - 6)
    parts = []
    for i, (e, role) in enumerate(zip(estimates, roles, strict=True)):
        if e is None:
            continue
        y = row * (i + 0.5) + 1
        a, m, b = (float(to_x(e[k])) for k in ("lo", "mean", "hi"))
        parts.append(f'<line class="whisker {role}" x1="{a:.1f}" x2="{b:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="mean {role}" cx="{m:.1f}" cy="{y}" r="3.4"/>')
    size = row * len(estimates) + 2
    return f'<svg class="intervals" viewBox="0 0 {width} {size}" aria-hidden="true">{"".join(parts)}</svg>'
