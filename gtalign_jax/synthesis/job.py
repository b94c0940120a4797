"""Synthesis from a config to a data set: batches of prompts, written, scored and put down one by one."""

import pathlib
import time
from collections.abc import Mapping, Sequence

import ml_collections

from gtalign_jax.data import sources
from gtalign_jax.data.item import Item
from gtalign_jax.errors import UserError
from gtalign_jax.files import drafts, paths
from gtalign_jax.mesh import processes
from gtalign_jax.remote.counters import Counters
from gtalign_jax.rewards.mutual_welfare import resolve_reward
from gtalign_jax.rewards.tasks.task import Tasks
from gtalign_jax.run.cold_start import SynthesisConfig
from gtalign_jax.run.job import make_judges
from gtalign_jax.run.lock import locked
from gtalign_jax.run.progress import Progress, batches, stage
from gtalign_jax.run.settings import Settings, make_settings, run_tasks
from gtalign_jax.run.signals import ended_by_sigterm
from gtalign_jax.synthesis import store
from gtalign_jax.synthesis.ask import Teacher, prompt_digest
from gtalign_jax.synthesis.candidates import Effort, write_candidates
from gtalign_jax.synthesis.records import Scoring, make_records
from gtalign_jax.synthesis.report import Tally, cost, overall, report_of, tally, text_report
from gtalign_jax.synthesis.teachers import make_teachers

ANSWERS = "answers"  # the folder of what servers said


def synthesize(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Write, or go on with, the chains of a config's prompts in its work directory."""
    settings = make_settings(config)  # refused before anything is written
    with drafts.naming_store(workdir), ended_by_sigterm(), locked(workdir):
        processes.from_main(lambda: store.claim(config, workdir))
        tasks = run_tasks(settings.data)
        scoring = _scoring(config, settings, tasks, workdir)
        teachers = make_teachers(settings, tasks, "" if paths.on_store(workdir) else str(workdir / ANSWERS))
        with stage("read the data"):
            read = sources.load_items(settings.data, tasks, settings.synthesis.split)
        items = _distinct(read)
        tallies = _write(settings, items, teachers, scoring, workdir)
        if processes.is_main():
            found = report_of(tallies, len(read) - len(items), _prices(settings.synthesis))
            path = store.finish(workdir, settings.synthesis.split, found)
            print(f"{text_report(found)}\nchains  {path}")


def _scoring(
    config: ml_collections.ConfigDict, settings: Settings, tasks: Tasks, workdir: pathlib.Path
) -> Scoring:
    judge, consistency = make_judges(settings, Counters(), tasks, workdir)
    return Scoring(
        reward_fn=resolve_reward(config.reward.fn),
        reward=settings.reward,
        features=settings.features,
        judge=judge,
        consistency=consistency,
        tasks=tasks,
    )


def _distinct(items: Sequence[Item]) -> list[Item]:
    """Each prompt once: published rows of one conversation share theirs."""
    return list({prompt_digest(item): item for item in reversed(items)}.values())[::-1]


def _write(
    settings: Settings,
    items: Sequence[Item],
    teachers: Mapping[str, Teacher],
    scoring: Scoring,
    workdir: pathlib.Path,
) -> dict[str, Tally]:
    """Make the records that are not there yet, a batch a file; returns what became of all of them."""
    wanted = settings.synthesis
    effort = Effort(wanted.candidates, wanted.attempts, settings.data.seed)
    done, tallies = processes.from_main(lambda: _done(items, workdir))
    began, first = time.monotonic(), done
    with Progress("synthesize", len(items), done) as progress:
        for batch in batches(items[done:], wanted.at_once):
            candidates = write_candidates(batch, teachers, effort)
            records = make_records(candidates, wanted.candidates, scoring)
            if processes.is_main():
                store.write_part(workdir, done, records)
            done, tallies = done + len(batch), tally(tallies, records)
            rate = (done - first) / (time.monotonic() - began)
            progress.update(done, _shown(overall(tallies), rate, _prices(wanted)))
    return tallies


def _done(items: Sequence[Item], workdir: pathlib.Path) -> tuple[int, dict[str, Tally]]:
    """How many records there are, and what became of them; UserError where they are not of these prompts."""
    tallies: dict[str, Tally] = {}
    count = 0
    for record in store.records(workdir):
        if count >= len(items) or record.get("digest") != prompt_digest(items[count]):
            raise UserError(
                f"{workdir}: record {count + 1} is of another prompt: the data changed; name a new --workdir"
            )
        tallies = tally(tallies, [record])
        count += 1
    return count, tallies


def _shown(row: Tally, rate: float, prices: tuple[float, float]) -> dict[str, float]:
    """What the progress line says beside the count."""
    n = row.counts
    values = {"prompts_per_min": 60 * rate, "given_up": n["candidates"] - n["standing"]}
    if n["kept"]:
        values["reward/welfare"] = row.kept / n["kept"]
    if n["tokens_out"]:
        values |= {"tokens_written": n["tokens_out"]}
    spent = cost(n["tokens_in"], n["tokens_out"], prices)
    return values | ({"cost": spent} if spent else {})


def _prices(wanted: SynthesisConfig) -> tuple[float, float]:
    return wanted.price_in, wanted.price_out
