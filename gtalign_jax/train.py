"""The whole path: SFT cold start, alignment on mutual welfare, evaluation, steering, report, export.

The two phases resume from their newest checkpoints (`phase.py`); an evaluation is made once.
"""

import copy
import functools
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import ml_collections
import numpy as np

from gtalign_jax import jsonl
from gtalign_jax.align import run_align
from gtalign_jax.data import loader
from gtalign_jax.data.packing import PackedStream
from gtalign_jax.evaluation.bootstrap import format_table, summary_table
from gtalign_jax.evaluation.heldout import evaluate_once
from gtalign_jax.evaluation.report.write import write_report
from gtalign_jax.files import drafts
from gtalign_jax.learning.sft import PackedBatch, SftBatch, sft_update
from gtalign_jax.mesh import processes
from gtalign_jax.mesh.memory import COLD_START, compile_to_fit
from gtalign_jax.models import lora
from gtalign_jax.planning.choose import choose_for_run
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.run import auto, checkpoint
from gtalign_jax.run.adapters import add_adapters, save_adapters
from gtalign_jax.run.job import Job, load_start, make_job, save_model, with_settings
from gtalign_jax.run.lock import locked
from gtalign_jax.run.log import NullLog, RunLog
from gtalign_jax.run.phase import Metrics, Phase, Session, open_session, run_phase
from gtalign_jax.run.progress import stage
from gtalign_jax.run.record import as_chosen, check_config, write_chosen, write_config
from gtalign_jax.run.settings import make_settings
from gtalign_jax.run.signals import ended_by_sigterm
from gtalign_jax.run.states import PHASES, sft_setup, sft_state
from gtalign_jax.serving.examples import steer_examples
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
    config = processes.from_main(lambda: as_chosen(config, workdir))
    processes.from_main(lambda: check_config(config, workdir))
    processes.from_main(lambda: write_config(config, workdir))  # before the model that is made as it says
    job = make_job(config, workdir)
    if not auto.asked(config):
        return config, job
    chosen = choose_for_run(config, job)
    config = auto.with_values(config, chosen)
    processes.from_main(lambda: write_chosen(config, workdir, chosen))
    return config, with_settings(job, make_settings(config))


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
        with stage("steer the examples"):
            examples = steer_examples(job, aligned)
    if processes.is_main():
        jsonl.write(workdir / "steering.jsonl", examples)
    return rows


def evaluate_model(config: ml_collections.ConfigDict, model: str, workdir: pathlib.Path, name: str) -> None:
    """Evaluate an HF folder on the config's held-out split; nothing is trained.

    The same again reads what is recorded; when the folder or the data have changed, it is made again.
    """
    config = copy.deepcopy(config)  # ConfigDict(config) would share its sections
    with config.unlocked():
        config.start.path = model
        config.sft.steps = config.align.steps = 0
    with drafts.naming_store(workdir), ended_by_sigterm(), locked(workdir):
        _, job = _make_job(config, workdir)
        with jax.set_mesh(job.mesh):
            rows = {name: evaluate_once(job, name, load_start(job), 0, weights=job.model_folder)}
        if processes.is_main():
            print(f"report  {finish(rows, workdir)}")


def finish(rows: dict[str, list[dict[str, Any]]], workdir: pathlib.Path) -> pathlib.Path:
    """Write summary.json and the report, print the table; returns the report's path."""
    summary = summary_table(rows)
    jsonl.write_atomic(workdir / "summary.json", json.dumps(jsonl.plain(summary), indent=1) + "\n")
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
    setup = sft_setup(settings, job.model)
    trained, base = lora.split(start)
    batches: Callable[[int], tuple[SftBatch | PackedBatch, Metrics]] = functools.partial(sft_batch, job)
    if settings.sft.pack:
        batches = functools.partial(packed_batch, job, packed_stream(job))

    def batch_of(k: int) -> tuple[SftBatch | PackedBatch, Metrics]:
        batch, counts = batches(k)
        return processes.global_batch(batch, settings.sft.prompts, job.mesh), counts

    def step(state: TrainState, k: int) -> tuple[TrainState, Metrics]:
        batch, counts = batch_of(k)
        state, metrics = sft_update(setup, state, batch, base)
        return state, metrics | counts

    def warm_up(state: TrainState, first: int) -> None:
        widths = (
            {0: first} if settings.sft.pack else sft_steps_by_width(job, range(first, settings.sft.steps))
        )
        for i, k in enumerate(widths.values(), 1):
            with stage(f"compile the cold start, {i} of {len(widths)}"):
                lowered = sft_update.lower(setup, state, batch_of(k)[0], base)
                compile_to_fit(lowered, COLD_START)  # kept by `sft_update`, which will find it

    warm = warm_up if settings.start.warm_up else None
    phase = Phase("sft", settings.sft.steps, step, warm, following=PHASES[1:], takes=COLD_START)
    state = run_phase(session, phase, sft_state(settings, setup, trained))
    return lora.join(base, state.policy.params)


def sft_steps_by_width(job: Job, steps: Iterable[int]) -> dict[int, int]:
    """Prompt bucket → the first of `steps` that trains on it."""
    widths = [engine_lib.prompt_slots(job.engine, row.prompt) for row in job.demonstrations]
    return loader.steps_by_width(widths, job.settings.sft.prompts, job.settings.data.seed, steps)


def packed_stream(job: Job) -> PackedStream:
    """The batches of a cold start whose chains are packed into rows."""
    sft = job.settings.sft
    return PackedStream(job.demonstrations, sft.prompts, sft.pack, job.settings.data.seed)


def packed_batch(job: Job, stream: PackedStream, k: int) -> tuple[PackedBatch, Metrics]:
    """(this host's rows of step k, what is in the whole batch)."""
    rows = stream.batch(k)
    mine = processes.host_rows(len(rows.tokens), job.mesh)
    arrays = (rows.tokens, rows.segments, rows.positions, rows.learn)
    counts = {"tokens": int(rows.learn.sum()), "chains": rows.chains}
    return PackedBatch(*(x[mine] for x in arrays)), counts


def sft_batch(job: Job, k: int) -> tuple[SftBatch, Metrics]:
    """(this host's demonstrations of step k, what is in the whole batch)."""
    data, seed = job.demonstrations, job.settings.data.seed
    rows = [data[i] for i in loader.step_rows(len(data), job.settings.sft.prompts, seed, k)]
    prompts = engine_lib.prompt_batch(job.engine, [row.prompt for row in rows])
    # The width of the prompts is the whole batch's, so that all hosts have the same shapes.
    mine = processes.host_rows(len(rows), job.mesh)
    completions = [rows[i].completions for i in mine]
    tokens, length = loader.pad_completions(completions, job.settings.max_new_tokens)
    mask = np.arange(tokens.shape[-1]) < length[..., None]
    count = sum(len(completion) for row in rows for completion in row.completions)
    return SftBatch(jax.tree.map(lambda x: x[mine], prompts), tokens, mask), {"tokens": count}
