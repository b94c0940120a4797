"""The recorded files of a run, read once: everything the report is made from."""

import dataclasses
import pathlib
from typing import Any

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.evaluation.bootstrap import Summary
from gtalign_jax.run.log import metrics_path
from gtalign_jax.run.rollouts import Dump, list_rollouts, newest

SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """config: config.json; records: metrics.jsonl; summary: summary.json; steering: steering.jsonl.

    dumps: (split, step, path) of every rollout file; they are read when needed. What a run has not
    written yet is empty.
    """

    workdir: pathlib.Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    summary: Summary
    steering: list[dict[str, Any]]
    dumps: list[Dump]

    @property
    def models(self) -> tuple[str, ...]:
        """Evaluated models, the baseline first and the aligned one last."""
        return tuple(self.summary)


def load_run(workdir: pathlib.Path) -> RecordedRun:
    """Read a work directory; UserError when it is not there or a file in it is damaged or another tool's."""
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such folder; name the workdir of a run")
    return RecordedRun(
        workdir=workdir,
        config=_read_object(workdir / "config.json"),
        records=_read_records(metrics_path(workdir)),
        summary=_read_summary(workdir / SUMMARY),
        steering=jsonl.read(workdir / "steering.jsonl"),
        dumps=list_rollouts(workdir),
    )


def load_begun(workdir: pathlib.Path) -> RecordedRun:
    """`load_run` of a folder in which a run or an evaluation has recorded something; else a UserError."""
    run = load_run(workdir)
    if not run.records and not run.summary:
        names = f"{metrics_path(workdir).name} or {SUMMARY}"
        raise UserError(f"{workdir}: has no {names}; name the workdir of a run or an evaluation")
    return run


def newest_rollouts(run: RecordedRun, model: str) -> list[dict[str, Any]]:
    """Rollout lines of a model's newest held-out evaluation, [] when there is none."""
    path = newest(run.dumps, model)
    return jsonl.read(path) if path else []


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    return jsonl.read_object(path) if path.is_file() else {}


def _read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    records = jsonl.read(path)
    if not all({"phase", "step"} <= record.keys() for record in records):
        raise UserError(f"{path}: lines without phase and step are no run's; name the workdir of a run")
    return records


def _read_summary(path: pathlib.Path) -> Summary:
    summary = _read_object(path)
    try:
        tasks = [task for by_task in summary.values() for task in by_task.values()]
        numbers = [e[name] for task in tasks for e in task.values() for name in ("mean", "lo", "hi")]
        whole = all(isinstance(number, int | float) for number in numbers)
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        shape = "{model: {task: {metric: {mean, lo, hi, n}}}}"
        raise UserError(f"{path}: is not {shape}; name the workdir of a run")
    return summary
