"""Which training curves are shown, and the points of the Pareto scatter: data for page and figures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gtalign_jax.game import pareto

# A role decides the colour: user, llm, welfare, neutral.
_PANELS = (
    (
        "Rewards",
        "batch mean",
        (("U", "reward/user", "user"), ("L", "reward/llm", "llm"), ("W", "reward/welfare", "welfare")),
    ),
    (
        "Format and answer",
        "batch mean",
        (("format", "reward/format", "llm"), ("answer", "reward/answer", "user")),
    ),
    ("KL to the reference", "nats per token", (("KL", "kl/ref", "welfare"),)),
    ("Entropy", "nats per token", (("entropy", "entropy/mean", "welfare"),)),
    ("Completion length", "tokens", (("length", "length/mean", "welfare"),)),
    ("Cold-start loss", "nats per token", (("loss", "loss/sft", "neutral"),)),
)
Records = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Series:
    """One line. x [n] steps; y [n] values as recorded; smooth [n] their moving average."""

    name: str
    role: str
    x: np.ndarray
    y: np.ndarray
    smooth: np.ndarray


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart, of one phase: steps count from 0 in each, so two phases share no axis."""

    title: str
    unit: str
    phase: str
    series: tuple[Series, ...]


def panels(records: Records, max_points: int = 400) -> list[Panel]:
    """The charts a run has data for, the last phase's first; longer lines are averaged to `max_points`."""
    found = []
    for phase, (mine,) in _by_phase([records]):
        for title, unit, lines in _PANELS:
            series = [_series(mine, *line, max_points) for line in lines]
            found.append(Panel(title, unit, phase, tuple(s for s in series if s is not None)))
    return [panel for panel in found if panel.series]


def overlays(runs: Mapping[str, Records], roles: Sequence[str], max_points: int = 200) -> list[Panel]:
    """The same numbers of several runs: a chart a number and phase, in it a line a run, of its role."""
    found = []
    for phase, of_phase in _by_phase(list(runs.values())):
        named = list(zip(of_phase, runs, roles, strict=True))
        for title, unit, lines in _PANELS:
            for name, key, _ in lines:
                series = [_series(records, run, key, role, max_points) for records, run, role in named]
                own = title if len(lines) == 1 else f"{name[0].upper()}{name[1:]}"
                found.append(Panel(own, unit, phase, tuple(s for s in series if s is not None)))
    return [panel for panel in found if panel.series]


def _by_phase(runs: Sequence[Records]) -> list[tuple[str, list[Records]]]:
    """(phase, its records of each run), the last phase of them all first."""
    phases = dict.fromkeys(r["phase"] for records in runs for r in records)
    return [(phase, [[r for r in x if r["phase"] == phase] for x in runs]) for phase in reversed(phases)]


def _series(records: Records, name: str, key: str, role: str, max_points: int) -> Series | None:
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    if not points:
        return None
    x, y = np.array(points, np.float64).T
    return Series(name, role, *(_thin(v, max_points) for v in (x, y, smooth(y))))


def smooth(y: np.ndarray) -> np.ndarray:
    """Centred moving average with triangular weights that reach a fifteenth of the line to each side.

    Centred, so it does not lag behind a fast fall; near the ends the weights that remain are rescaled.
    """
    reach = 1 + len(y) // 15
    weights = reach - np.abs(np.arange(1 - reach, reach)).astype(np.float64)
    mean = np.convolve(y, weights) / np.convolve(np.ones_like(y), weights)
    return mean[reach - 1 : reach - 1 + len(y)]


def _thin(v: np.ndarray, max_points: int) -> np.ndarray:
    """Means of at most `max_points` runs of neighbours."""
    if len(v) <= max_points:
        return v
    return np.array([part.mean() for part in np.array_split(v, max_points)])


@dataclasses.dataclass(frozen=True)
class Cloud:
    """One model's completions as points. points [n, 2]: (U, L); frontier [m, 2]: by falling U."""

    model: str
    points: np.ndarray
    frontier: np.ndarray
    mean: np.ndarray


def cloud(model: str, rows: Sequence[Mapping[str, Any]]) -> Cloud | None:
    """The (U, L) points of rollout lines, None when there are none."""
    pairs = [(r.get("user_reward"), r.get("llm_reward")) for r in rows]
    points = np.array([p for p in pairs if None not in p], np.float64).reshape(-1, 2)
    if not len(points):
        return None
    return Cloud(model, points, pareto.frontier_points(points)[::-1], points.mean(0))


def thin_points(points: np.ndarray, max_points: int) -> np.ndarray:
    """At most `max_points` of the points, evenly picked in recorded order."""
    return points[:: -(-len(points) // max_points)] if len(points) else points
