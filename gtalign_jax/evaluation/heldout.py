"""Evaluating a model on held-out prompts, once: `evaluations.json` says of what, and in how many lines."""

import collections
import dataclasses
import hashlib
import json
import logging
import pathlib
from typing import Any

import jax

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.mesh import processes
from gtalign_jax.mesh.memory import EVALUATION, told
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.engine import Engine, prompt_slots
from gtalign_jax.rollout.generator import Shape, compile_largest, fitting, generate, hand_over
from gtalign_jax.rollout.request import Request
from gtalign_jax.run import checksums
from gtalign_jax.run.job import Job
from gtalign_jax.run.progress import stage
from gtalign_jax.run.rollouts import FIELDS, write_rollouts
from gtalign_jax.run.score import rollout_lines, score
from gtalign_jax.types import PyTree

log = logging.getLogger(__name__)
RECORD = "evaluations.json"


def evaluate(job: Job, params: PyTree, step: int) -> list[dict[str, Any]]:
    """Rollout lines of `samples` completions of every test prompt.

    The random key is the evaluation's own, so every model meets the same draws.
    """
    config, (engine, count) = job.settings.evaluate, evaluation_engine(job)
    lines = []
    compile_evaluation(job, params)
    hand_over(job.generator, engine, params)
    with stage("evaluate", len(job.test.items)) as advance, told(EVALUATION):
        for first in range(0, len(job.test.items), count):
            items = job.test.items[first : first + count]
            prompts = engine_lib.prompt_batch(engine, job.test.tokens[first : first + count])
            request = Request(
                prompts=prompts,
                key=jax.random.key(config.seed),
                group_size=config.samples,
                max_new_tokens=job.settings.max_new_tokens,
                first_row=first,
            )
            rollout = generate(job.generator, engine, params, request)
            lines += rollout_lines(rollout, score(job, rollout, items), step)
            advance(min(first + count, len(job.test.items)))
    return lines


def evaluation_engine(job: Job) -> tuple[Engine, int]:
    """(the engine as an evaluation samples, how many prompts it is given at a time)."""
    config = job.settings.evaluate
    sampling = dataclasses.replace(job.settings.sampling, temperature=config.temperature)
    count = min(config.prompts, len(job.test.items))
    buckets = dataclasses.replace(job.settings.buckets, batch=(count,))
    return dataclasses.replace(job.engine, sampling=sampling, buckets=buckets), count


def compile_evaluation(job: Job, params: PyTree) -> None:
    """Compile for every bucket of prompts that an evaluation meets, before the first one runs.

    params: arrays or their shapes. UserError for what does not fit in memory.
    """
    engine, count = evaluation_engine(job)
    if job.mesh_judge is not None:
        job.mesh_judge.warm_up(job.test.items)
    slots = [prompt_slots(engine, tokens) for tokens in job.test.tokens]
    widths = sorted({max(slots[first : first + count]) for first in range(0, len(slots), count)})
    for i, width in enumerate(widths, 1):
        shape = Shape(count, width, job.settings.evaluate.samples, job.settings.max_new_tokens)
        with stage(f"compile evaluation, {i} of {len(widths)}"):
            compile_largest(fitting(EVALUATION), job.generator, engine, params, shape)


def evaluate_once(
    job: Job, name: str, params: PyTree, step: int, *, weights: pathlib.Path | None = None
) -> list[dict[str, Any]]:
    """The rollout lines of a model's evaluation, from its file when a run before this one made it.

    weights: the folder that `params` were read from, which may have changed since; None when they follow from
    the run's own config. A file that is not whole, or is of other weights or data, is made again.
    """
    path = job.workdir / "rollouts" / f"{name}_{step}.jsonl"
    of = processes.from_main(lambda: _fingerprint(job, weights))
    lines = processes.from_main(lambda: _kept(job.workdir, path, of))
    if lines is None:
        lines = evaluate(job, params, step)
        if processes.is_main():
            write_rollouts(job.workdir, name, step, lines)
            _record(job.workdir, path.stem, {"lines": len(lines)} | of)
    return processes.from_main(lambda: jsonl.read(path))


def _fingerprint(job: Job, weights: pathlib.Path | None) -> dict[str, str]:
    """What an evaluation is of, besides the config that the work directory holds."""
    test = job.test
    asked = [
        (item.messages, item.ground_truth, ids) for item, ids in zip(test.items, test.tokens, strict=True)
    ]
    held = {} if weights is None else {"weights": _digest(checksums.folder_sums(weights))}
    return {"data": _digest(jsonl.plain(asked)), **held}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _kept(workdir: pathlib.Path, path: pathlib.Path, of: dict[str, str]) -> list[dict[str, Any]] | None:
    """The lines of a whole evaluation of just this, or None: then it is to be made."""
    if not path.is_file():
        return None
    recorded = _recorded(workdir).get(path.stem)
    try:
        lines = jsonl.read(path)
        reason = _fault(lines, recorded, of)
    except UserError as error:
        reason = str(error)
    if reason:
        log.warning("%s: %s; it is made again", path, reason)
        return None
    return lines


def _fault(lines: list[dict[str, Any]], recorded: Any, of: dict[str, str]) -> str:
    """Why recorded lines cannot stand for the evaluation of what `of` says, or ""."""
    if not lines or any(line.keys() < FIELDS for line in lines):
        return "not whole"
    if not isinstance(recorded, dict):  # of 0.1.0, which wrote the lines alone
        return "not known of which weights it is" if "weights" in of else ""
    if recorded.get("lines") != len(lines):
        return f"{len(lines)} of {recorded.get('lines')} lines are there"
    changed = [name for name, value in of.items() if recorded.get(name) != value]
    return f"of other {' and '.join(changed)}" if changed else ""


def _recorded(workdir: pathlib.Path) -> dict[str, Any]:
    """Name of a rollout file of this workdir → how many lines it has, and of what."""
    path = workdir / RECORD
    try:
        return jsonl.read_object(path) if path.is_file() else {}
    except UserError as error:
        log.warning("%s; evaluations are made again", error)
        return collections.defaultdict(dict)


def _record(workdir: pathlib.Path, name: str, fields: dict[str, Any]) -> None:
    """Say what the evaluation `name` is of, once its file is written."""
    entries = dict(_recorded(workdir)) | {name: fields}
    jsonl.write_atomic(workdir / RECORD, json.dumps(entries, indent=1, sort_keys=True) + "\n")
