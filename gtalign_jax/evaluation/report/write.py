"""`report.html`: one self-contained page about a run, built from the files of its workdir alone."""

import pathlib
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from gtalign_jax import jsonl
from gtalign_jax.config import build
from gtalign_jax.evaluation.bootstrap import OVERALL, Estimate, digits, separated, too_few
from gtalign_jax.evaluation.report import curves, figures, settings
from gtalign_jax.evaluation.report.recorded import RecordedRun, load_run, newest_rollouts
from gtalign_jax.evaluation.report.render import charts, estimate_cell, render
from gtalign_jax.evaluation.report.samples import count_lines, pick_samples, steering_examples
from gtalign_jax.files import paths
from gtalign_jax.run.health import HealthConfig, scan

# What the results show: metric, its name, what it is, its colour.
SHOWN = (
    ("utility", "Welfare W", "√(U·L), what alignment maximises", "welfare"),
    ("user_reward", "User U", "answer quality and little to read", "user"),
    ("llm_reward", "Assistant L", "answer quality, format and a usable matrix", "llm"),
    ("answer_reward", "Answer", "the judge's score, 0 to 1", ""),
    ("format_reward", "Format", "share with the four blocks in order", ""),
    ("n_tokens", "Tokens", "length of the completion", ""),
)


def write_report(workdir: str | pathlib.Path) -> pathlib.Path:
    """Write `report.html` and `figures/*.png` of a run; returns the page's path.

    It may be called at any time: what the run has not recorded yet is left out. Raises UserError when
    the folder is missing or one of its files is damaged.
    """
    return write_page(load_run(paths.path(workdir)))


def write_page(run: RecordedRun) -> pathlib.Path:
    """`write_report` of a run that was read."""
    panels = curves.panels(run.records)
    roles = _roles(run.models)
    found = [curves.cloud(model, newest_rollouts(run, model)) for model in run.models]
    clouds = [cloud for cloud in found if cloud is not None]
    cloud_roles = [roles[cloud.model] for cloud in clouds]
    figures.save_figures(run.workdir / "figures", panels, clouds, cloud_roles)
    scatter = Markup(figures.clouds_svg(clouds, cloud_roles)) if clouds else ""
    path = run.workdir / "report.html"
    jsonl.write_atomic(path, _page(run, roles, charts(panels), scatter))
    return path


def _page(run: RecordedRun, roles: Mapping[str, str], drawn: list[dict[str, str]], scatter: str) -> str:
    shown, steered = pick_samples(run), steering_examples(run.steering)
    tables = _tables(run, roles)
    present = {
        "results": ("Results", tables),
        "pareto": ("Pareto", scatter),
        "training": ("Training", drawn),
        "samples": ("Samples", shown),
        "steering": ("Steering", steered),
        "settings": ("Settings", run.config),
    }
    context = {
        "name": paths.absolute(run.workdir).name,
        "lede": _lede(run),
        "sections": [(key, title) for key, (title, content) in present.items() if content],
        "findings": scan(run.records, build(HealthConfig, run.config.get("health", {}), "health")),
        "tiles": _tiles(run),
        "tables": tables,
        "too_few": too_few(run.summary),
        "results_note": _results_note(run),
        "models": [{"name": model, "role": roles[model]} for model in run.models],
        "scatter": scatter,
        "charts": drawn,
        "sample_count": f"{len(shown):,}" if shown else "",
        "line_count": f"{count_lines(run):,}",
        "steering_count": len(steered),
        "settings": settings.groups(run.config),
    }
    return render("page", {"samples": shown, "steering": steered}, context)


def _roles(models: tuple[str, ...]) -> dict[str, str]:
    """Colours: grey for the baseline, the accent for the last model, another between them."""
    roles = dict.fromkeys(models, "middle")
    if models:
        roles[models[0]] = "base"
        roles[models[-1]] = "aligned"
    return roles


def _lede(run: RecordedRun) -> str:
    last: dict[str, int] = {}
    for record in run.records:
        last[record["phase"]] = max(record["step"] + 1, last.get(record["phase"], 0))
    parts = [f"{steps:,} steps of {phase}" for phase, steps in last.items()]
    if len(run.models) > 1:
        parts.append(f"evaluation of {' and '.join(run.models)} on the same held-out prompts")
    elif run.models:
        parts.append(f"evaluation of {run.models[0]}")
    return ", ".join(parts) + "." if parts else "Nothing is recorded yet."


def _results_note(run: RecordedRun) -> str:
    overall = [table.get(OVERALL, {}) for table in run.summary.values()]
    counts = sorted({table["utility"]["n"] for table in overall if "utility" in table})
    return f" (n = {' / '.join(f'{n:,}' for n in counts)})" if counts else ""


def _tiles(run: RecordedRun) -> list[dict[str, str]]:
    """The overall numbers of the last model, beside those of the first."""
    if not run.models:
        return []
    first, last = (run.summary[run.models[i]].get(OVERALL, {}) for i in (0, -1))
    tiles = []
    for metric, label, _, role in SHOWN:
        if metric not in last:
            continue
        e = last[metric]
        note = f"95 % {e['lo']:.{digits(e)}f} to {e['hi']:.{digits(e)}f}"
        if len(run.models) > 1 and metric in first:
            note = f"{run.models[0]} {first[metric]['mean']:.{digits(e)}f}, {_signed(first[metric], e)}"
        tiles.append({"label": label, "value": f"{e['mean']:.{digits(e)}f}", "note": note, "role": role})
    return tiles


def _signed(a: Estimate, b: Estimate) -> str:
    return f"{b['mean'] - a['mean']:+.{digits(b)}f}".replace("-", "−")


def _tables(run: RecordedRun, roles: Mapping[str, str]) -> list[dict[str, Any]]:
    """One table a metric: a row a task, `overall` last, with the intervals drawn on a common range."""
    tasks = list(dict.fromkeys(task for table in run.summary.values() for task in table))
    tasks.sort(key=lambda task: task == OVERALL)
    tables = []
    for metric, label, help_text, _ in SHOWN:
        by_task = {t: [run.summary[m].get(t, {}).get(metric) for m in run.models] for t in tasks}
        present = [e for row in by_task.values() for e in row if e]
        if not present:
            continue
        lo, hi = min(e["lo"] for e in present), max(e["hi"] for e in present)
        hi = hi if hi > lo else lo + 1e-6
        rows = [_row(task, row, [roles[m] for m in run.models], lo, hi) for task, row in by_task.items()]
        ends = {"lo": _number(lo), "hi": _number(hi)}
        tables.append({"metric": metric, "label": label, "help": help_text, "rows": rows, **ends})
    return tables


def _row(
    task: str, estimates: list[Estimate | None], roles: list[str], lo: float, hi: float
) -> dict[str, Any]:
    first, last = estimates[0], estimates[-1]
    change, clear = "–", False
    if first is not None and last is not None:
        change, clear = _signed(first, last), separated(first, last)
    return {
        "task": task,
        "overall": task == OVERALL,
        "cells": [estimate_cell(e) if e else None for e in estimates],
        "change": change,
        "clear": clear,
        "bars": [_bar(e, role, lo, hi) for e, role in zip(estimates, roles, strict=True) if e],
    }


def _bar(e: Estimate, role: str, lo: float, hi: float) -> dict[str, Any]:
    """An interval as drawn: where it begins, how long it is and where its mean is, in % of [lo, hi]."""
    left, right, mean = (round(100 * (e[k] - lo) / (hi - lo), 2) for k in ("lo", "hi", "mean"))
    return {"role": role, "left": left, "width": right - left, "mean": mean}


def _number(value: float) -> str:
    """A number with three significant digits and no trailing zeros."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.3g}"
