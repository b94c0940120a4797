"""The recorded files of a run, read once: everything the report is made from."""

import dataclasses
import pathlib
from typing import Any

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.evaluation.bootstrap import Summary
from gtalign_jax.run.log import metrics_path
from gtalign_jax.run.rollouts import list_rollouts


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
    dumps: list[tuple[str, int, pathlib.Path]]

    @property
    def models(self) -> tuple[str, ...]:
        """Evaluated models, the baseline first and the aligned one last."""
        return tuple(self.summary)


def load_run(workdir: pathlib.Path) -> RecordedRun:
    """Read a work directory; UserError when it is not there or a file in it is damaged."""
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such folder; name the workdir of a run")
    return RecordedRun(
        workdir=workdir,
        config=_read_object(workdir / "config.json"),
        records=jsonl.read(metrics_path(workdir)),
        summary=_read_object(workdir / "summary.json"),
        steering=jsonl.read(workdir / "steering.jsonl"),
        dumps=list_rollouts(workdir),
    )


def newest_rollouts(run: RecordedRun, model: str) -> list[dict[str, Any]]:
    """Rollout lines of a model's newest held-out evaluation, [] when there is none."""
    paths = [path for split, _, path in run.dumps if split == model]
    return jsonl.read(paths[-1]) if paths else []


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    return jsonl.read_object(path) if path.is_file() else {}
