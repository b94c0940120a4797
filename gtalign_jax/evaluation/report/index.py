"""Several runs on one page: sortable tables, settings that differ, curves, models item by item, samples."""

import os
import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.evaluation.bootstrap import OVERALL
from gtalign_jax.evaluation.report import curves, figures, settings
from gtalign_jax.evaluation.report.items import Contender, compare
from gtalign_jax.evaluation.report.recorded import RecordedRun, load_begun, newest_rollouts
from gtalign_jax.evaluation.report.render import charts, estimate_cell, render
from gtalign_jax.evaluation.report.samples import SampleConfig, pick_samples
from gtalign_jax.evaluation.report.write import SHOWN
from gtalign_jax.files import paths

_SAMPLES = SampleConfig(steps=2, each=5, max_chars=8000)


def write_index(runs: Mapping[str, RecordedRun], out: pathlib.Path) -> pathlib.Path:
    """Write `runs.html` into the folder `out`, from the files of the runs alone; returns its path.

    A run may still go on: what it has not recorded yet is left out.
    """
    page = out / "runs.html"
    jsonl.write_atomic(page, _page(runs, out))
    return page


def load_runs(workdirs: Sequence[str]) -> dict[str, RecordedRun]:
    """Name to run, each folder once; the name is as much of the path's end as tells the runs apart.

    UserError names a folder that is missing or no run, or a damaged file.
    """
    folders = list(dict.fromkeys(paths.absolute(workdir) for workdir in workdirs))
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return {"/".join(folder.parts[-depth:]): load_begun(folder) for folder in folders}


def common_folder(runs: Mapping[str, RecordedRun]) -> pathlib.Path:
    """The deepest folder that all runs lie in; UserError where they have none."""
    above = [list(run.workdir.parents)[:-1] for run in runs.values()]
    for folder in above[0]:
        if all(folder in parents for parents in above):
            return folder
    raise UserError("the runs lie in no common folder; name one for their page, --out=DIR")


def _page(runs: Mapping[str, RecordedRun], out: pathlib.Path) -> str:
    roles = [figures.RUN_ROLES[i % len(figures.RUN_ROLES)] for i in range(len(runs))]
    contenders = [
        Contender(name, model, newest_rollouts(run, model))
        for name, run in runs.items()
        for model in run.models
    ]
    samples = [s | {"run": name} for name, run in runs.items() for s in pick_samples(run, _SAMPLES)]
    compared = compare(contenders)
    panels = curves.overlays({name: run.records for name, run in runs.items()}, roles)
    present = {
        "results": ("Results", True),
        "settings": ("Settings", len(runs) > 1),
        "training": ("Training", panels),
        "items": ("Item by item", compared["items"]),
        "samples": ("Samples", samples),
    }
    context = {
        "name": "Runs",
        "lede": _lede(runs),
        "sections": [(key, title) for key, (title, content) in present.items() if content],
        "metrics": [(label, help_text) for _, label, help_text, _ in SHOWN],
        "tables": _tables(runs, out),
        "names": list(runs),
        "differences": settings.differences([run.config for run in runs.values()]),
        "legend": [figures.swatch(role) | {"name": name} for name, role in zip(runs, roles, strict=True)],
        "charts": charts(panels, named=False),
        "items_shown": len(compared["items"]),
        "items_total": compared["total"],
        "sample_count": len(samples),
    }
    return render("index", {"samples": samples, "compared": compared}, context)


def _lede(runs: Mapping[str, RecordedRun]) -> str:
    evaluated = sum(bool(run.summary) for run in runs.values())
    return (
        f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {evaluated} of them evaluated on held-out prompts."
    )


def _tables(runs: Mapping[str, RecordedRun], out: pathlib.Path) -> list[dict[str, Any]]:
    """A table a task, `overall` first: a row a run and model; a run without results has one row too."""
    tasks = [
        OVERALL,
        *(task for run in runs.values() for by_task in run.summary.values() for task in by_task),
    ]
    return [
        {
            "task": task,
            "rows": [
                {"run": name, "link": _link(run, out), "model": model, "recorded": _recorded(run)}
                | {"cells": _cells(run.summary.get(model, {}).get(task, {}))}
                for name, run in runs.items()
                for model in run.models or ("",)
            ],
        }
        for task in dict.fromkeys(tasks)
    ]


def _cells(found: Mapping[str, Any]) -> list[dict[str, Any] | None]:
    return [estimate_cell(found[metric]) if metric in found else None for metric, *_ in SHOWN]


def _recorded(run: RecordedRun) -> str:
    """How far the run has come."""
    return f"{run.records[-1]['phase']} {run.records[-1]['step'] + 1:,}" if run.records else ""


def _link(run: RecordedRun, out: pathlib.Path) -> str:
    """Where the run's own report is, as seen from the index; "" where there is none to be opened."""
    report = run.workdir / "report.html"
    if paths.on_store(out) or paths.on_store(report) or not report.is_file():
        return ""
    return urllib.parse.quote(os.path.relpath(report, out).replace(os.sep, "/"))
