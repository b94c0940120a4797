"""The whole path: SFT cold start, alignment on mutual welfare, evaluation, steering, report, export.

The two phases resume from their newest checkpoints (`phase.py`); an evaluation is made once.
"""

import contextlib
import copy
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections

from gtalign_jax import jsonl
from gtalign_jax.align import run_align
from gtalign_jax.evaluation.bootstrap import format_table, summary_table
from gtalign_jax.evaluation.heldout import compile_evaluation, evaluate_once
from gtalign_jax.evaluation.report.write import write_report
from gtalign_jax.evaluation.taught import compile_lessons, learnt
from gtalign_jax.files import drafts
from gtalign_jax.learning.sft import PackedBatch, SftBatch, sft_update
from gtalign_jax.mesh import processes
from gtalign_jax.mesh.memory import COLD_START, GENERATION, compile_to_fit, told
from gtalign_jax.models import lora
from gtalign_jax.planning.choose import choose_for_run
from gtalign_jax.planning.programs import abstract_params
from gtalign_jax.run import auto, checkpoint
from gtalign_jax.run.adapters import add_adapters, save_adapters
from gtalign_jax.run.card import write_card
from gtalign_jax.run.epochs import epoch_ends, packed_stream
from gtalign_jax.run.job import Job, load_start, make_job, save_model, with_settings
from gtalign_jax.run.lessons import packed_batch, sft_batch
from gtalign_jax.run.lock import locked
from gtalign_jax.run.log import NullLog, RunLog
from gtalign_jax.run.phase import Metrics, Phase, Session, open_session, run_phase
from gtalign_jax.run.progress import stage
from gtalign_jax.run.record import (
    check_config,
    chosen_before,
    read_config_json,
    write_chosen,
    write_config,
)
from gtalign_jax.run.settings import make_settings
from gtalign_jax.run.signals import ended_by_sigterm
from gtalign_jax.run.states import PHASES, sft_setup, sft_state
from gtalign_jax.serving.examples import steer_examples
from gtalign_jax.serving.heldout import steer_heldout
from gtalign_jax.serving.sweep import Point, Pricing
from gtalign_jax.types import PyTree, TrainState


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Run, or go on with, the job of a config in its work directory."""
    checkpoint.check_place(workdir)
    with drafts.naming_store(workdir), ended_by_sigterm(), locked(workdir):
        rows = _train(*_make_job(config, workdir))
        if processes.is_main():
            print(f"report  {finish(rows, workdir)}\nmodel   {workdir / 'hf'}")


def _make_job(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> tuple[ml_collections.ConfigDict, Job]:
    """(config, job) of a config that may run in `workdir`, where it is then recorded; nothing in it is `auto`
    any more."""
    make_settings(config)  # refused before anything is written
    chosen = processes.from_main(lambda: chosen_before(config, workdir))
    config = auto.with_values(config, chosen) if chosen else config
    processes.from_main(lambda: check_config(config, workdir))
    processes.from_main(lambda: write_config(config, workdir))  # before the model that is made as it says
    job = make_job(config, workdir)
    if not auto.asked(config):
        return config, job
    chosen = choose_for_run(config, job)
    config = auto.with_values(config, chosen)
    processes.from_main(lambda: write_chosen(config, workdir, chosen))
    job = with_settings(job, make_settings(config))
    # Nothing of it is chosen; where it does not fit that is said now, and not after the cold start.
    compile_evaluation(job, abstract_params(job.model, job.mesh, job.settings.lora))
    return config, job


def _train(config: ml_collections.ConfigDict, job: Job) -> dict[str, list[dict[str, Any]]]:
    """Both phases and what follows them; returns the rollout lines of each evaluation."""
    settings, workdir = job.settings, job.workdir
    log: RunLog = NullLog()
    if processes.is_main():
        log = RunLog(workdir, PHASES, settings.metrics, settings=config.to_dict())
    with open_session(workdir, job.mesh, log, settings.checkpoint, settings.health) as session:
        sft = run_sft(job, add_adapters(job, load_start(job)), session)
        rows = {"sft": evaluate_once(job, "sft", sft, settings.sft.steps)}
        aligned = run_align(job, sft, session)
        if settings.align.steps:
            rows["aligned"] = evaluate_once(job, "aligned", aligned, settings.align.steps)
        save_model(aligned, job.model, workdir / "hf", job.engine.tokenizer, job.model_folder)
        save_adapters(aligned, settings, job.model, workdir / "adapter", job.model_folder)
        with stage("steer the examples"), told(GENERATION):
            examples = steer_examples(job, aligned)
    if processes.is_main():
        jsonl.write(workdir / "steering.jsonl", examples)
    return rows


def evaluate_model(config: ml_collections.ConfigDict, model: str, workdir: pathlib.Path, name: str) -> None:
    """Evaluate an HF folder on the config's held-out split; nothing is trained.

    The same again reads what is recorded; when the folder or the data have changed, it is made again.
    """
    with _of_model(config, model, workdir) as job:
        rows = {name: evaluate_once(job, name, load_start(job), 0, weights=job.model_folder)}
        if processes.is_main():
            print(f"report  {finish(rows, workdir)}")


def steer_model(
    config: ml_collections.ConfigDict,
    model: str,
    workdir: pathlib.Path,
    pricing: Pricing,
    points: Sequence[Point],
) -> None:
    """Steer an HF folder at several prices on the config's held-out split, and write `sweep.jsonl`."""
    with _of_model(config, model, workdir) as job, told(GENERATION):
        lines = list(steer_heldout(job, load_start(job), pricing, points))
        if processes.is_main():
            jsonl.write(workdir / "sweep.jsonl", lines)


@contextlib.contextmanager
def _of_model(config: ml_collections.ConfigDict, model: str, workdir: pathlib.Path) -> Iterator[Job]:
    """The job of an HF folder that is asked and not trained, in its own work directory."""
    config = copy.deepcopy(config)  # ConfigDict(config) would share its sections
    with config.unlocked():
        config.start.path = model
        config.sft.steps = config.sft.epochs = config.align.steps = 0
    with drafts.naming_store(workdir), ended_by_sigterm(), locked(workdir):
        _, job = _make_job(config, workdir)
        with jax.set_mesh(job.mesh):
            yield job


def finish(rows: dict[str, list[dict[str, Any]]], workdir: pathlib.Path) -> pathlib.Path:
    """Write summary.json, the model's card and the report, print the table; returns the report's path."""
    with stage("write tables and report"):
        summary = summary_table(rows)
        jsonl.write_atomic(workdir / "summary.json", json.dumps(jsonl.plain(summary), indent=1) + "\n")
        if (workdir / "hf").is_dir():  # not of an evaluation
            write_card(workdir / "hf", read_config_json(workdir), jsonl.plain(summary))
        report = write_report(workdir)
    print(format_table(summary))
    return report


def run_sft(job: Job, start: PyTree, session: Session) -> PyTree:
    """The parameters after the cold start.

    With adapters in `start`, those alone are trained, and alignment goes on with the same ones. Merging them
    here would round them to the weights' type and need a second copy of the weights; this way the exported
    adapter fits the model the run started from, and a frozen copy of a few megabytes is the reference.
    """
    settings = job.settings
    if not settings.sft.steps:
        return start
    setup, feed = sft_setup(settings, job.model), job.feeds.demonstrations
    trained, base = lora.split(start)
    batches: Callable[[int], tuple[SftBatch | PackedBatch, Metrics]] = functools.partial(sft_batch, job)
    if settings.sft.pack:
        batches = functools.partial(packed_batch, job, packed_stream(settings, job.demonstrations))
    ends: set[int] = set()  # of epochs, after which it is told what is learnt
    if job.held_out:
        every = epoch_ends(settings, job.demonstrations)
        ends = {*itertools.takewhile(lambda n: n < settings.sft.steps, every), settings.sft.steps}

    def batch_of(k: int) -> tuple[SftBatch | PackedBatch, Metrics]:
        batch, counts = batches(k)
        return processes.global_batch(batch, settings.sft.prompts, job.mesh), counts

    def step(state: TrainState, k: int) -> tuple[TrainState, Metrics]:
        batch, counts = batch_of(k)
        state, metrics = sft_update(setup, state, batch, base)
        if k + 1 in ends:
            counts = {**counts, **learnt(job, lora.join(base, state.policy.params), k)}
        return state, {**metrics, **counts}

    def warm_up(state: TrainState, first: int) -> None:
        widths = {0: first} if settings.sft.pack else feed.steps_by_width(range(first, settings.sft.steps))
        for i, k in enumerate(widths.values(), 1):
            with stage(f"compile the cold start, {i} of {len(widths)}"):
                lowered = sft_update.lower(setup, state, batch_of(k)[0], base)
                compile_to_fit(lowered, COLD_START)  # kept by `sft_update`, which will find it
        if ends:
            with stage("compile what the cold start is asked"):
                compile_lessons(job, lora.join(base, state.policy.params))

    warm = warm_up if settings.start.warm_up else None
    phase = Phase("sft", settings.sft.steps, step, warm, following=PHASES[1:], takes=COLD_START, feed=feed)
    state = run_phase(session, phase, sft_state(settings, setup, trained))
    return lora.join(base, state.policy.params)
