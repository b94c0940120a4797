"""Throughput and memory of streamed data; one JSON line a case.

    python -m experiments.bench_data [--case=NAME] [--rows=100000] [--workers=2] [--epochs=10]

    rate      rows a second, from ArrayRecord files to batches of token ids padded to their bucket
    first     seconds to the first batch, with a thread and with worker processes, from 1e3 rows to --rows
    memory    resident memory of all processes after each of --epochs epochs

Rows are questions as long as AmbigQA's (8 words in the median, 13 in the longest twentieth) under the short
instruction, in a data set that is made first. All goes through the feed that a run trains on, with nothing in
place of training. Fields: rows, batch, tokens of a prompt (mean), workers; per_s (the median of --repeats
measurements of --rows rows, after the first tenth) with its target on 2 cores; seconds; cpu_us (microseconds
of a core for a row, in this process and its workers together: what per_s would be on cores that nobody else
uses follows from it); mib and grows (MiB a million rows, by a line through the second half of the epochs).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil

from configs import base
from gtalign_jax.data.builders.records import write_records
from gtalign_jax.data.loader import Prompt, PromptSet
from gtalign_jax.data.order import Feed
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.rewards.tasks import TASKS
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.run import feeds
from gtalign_jax.run.settings import make_settings

Line = dict[str, object]
BATCH = 64
TARGET = 20_000  # rows a second on 2 cores
WORDS = (
    "who what when where which how the a of in on is was did many first last name song movie season city "
    "river won played wrote world state new year team president book show episode number old largest come "
    "made from with about between record company actor character called after before during country"
).split()


def questions(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Records of questions as long as AmbigQA's."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        words = rng.choice(WORDS, int(np.clip(rng.normal(8.6, 2.2), 5, 16)))
        yield {"question": f"{' '.join(words).capitalize()}?", "truth": "non_ambiguous"}


@contextlib.contextmanager
def data_set(count: int) -> Iterator[pathlib.Path]:
    """A folder with `count` rows of training data."""
    with tempfile.TemporaryDirectory(prefix="bench-data-") as name:
        folder = pathlib.Path(name)
        write_records(folder, "bench", "ambig_qa", {"train": questions(count), "test": questions(8)})
        yield folder


def open_feed(folder: pathlib.Path, workers: int) -> tuple[Engine, Feed[Prompt]]:
    """(an engine with a tokenizer of our own, the feed of a run over the data set)."""
    config = base.get_config()
    config.data.update(
        source=f"tfds:bench:{folder}", tasks=("ambig_qa",), train_per_task=0, workers=workers, bucket_steps=4
    )
    config.align.update(steps=1, prompts=BATCH)
    config.buckets.prompt = (48, 64, 96)
    settings = make_settings(config)
    tokenizer = train_tokenizer((record["question"] for record in questions(2000)), 2048)
    engine = Engine(tokenizer, ModelConfig(vocab_size=len(tokenizer)), (0,), buckets=settings.buckets)
    tasks = {"ambig_qa": TASKS["ambig_qa"]}
    return engine, feeds.streamed(settings, tasks, engine, PromptSet([], []), []).prompts


def read(engine: Engine, feed: Feed[Prompt], steps: range) -> int:
    """Make the batches of these steps; the tokens in their prompts."""
    tokens = 0
    for k in steps:
        batch = engine_lib.prompt_batch(engine, [row.tokens for row in feed.batch(k)])
        tokens += int(batch.length.sum())
    return tokens


def rate(rows: int, workers: int, repeats: int) -> Line:
    """Rows a second once it runs; each measurement goes on where the one before ended."""
    with data_set(rows) as folder:
        engine, feed = open_feed(folder, workers)
        with contextlib.closing(feed):
            warm, steps, seconds = rows // BATCH // 10 + 1, rows // BATCH, []
            tokens = read(engine, feed, range(warm)) / (warm * BATCH)
            cpu = cpu_seconds()
            for number in range(repeats):
                first = warm + number * steps
                start = time.perf_counter()
                read(engine, feed, range(first, first + steps))
                seconds.append(time.perf_counter() - start)
            cpu = cpu_seconds() - cpu
    per_s = round(steps * BATCH / statistics.median(seconds))
    cpu_us = round(cpu / (repeats * steps * BATCH) * 1e6, 1)
    line: Line = {
        "case": "rate",
        "rows": rows,
        "batch": BATCH,
        "tokens": round(tokens, 1),
        "workers": workers,
    }
    seconds = [round(s, 2) for s in seconds]
    return {**line, "per_s": per_s, "target": TARGET, "cpu_us": cpu_us, "seconds": seconds}


def first(rows: int, workers: int) -> Line:
    """Seconds from an open data set to the first batch."""
    with data_set(rows) as folder:
        start = time.perf_counter()
        engine, feed = open_feed(folder, workers)
        with contextlib.closing(feed):
            opened = time.perf_counter() - start
            read(engine, feed, range(1))
            seconds = time.perf_counter() - start - opened
    line: Line = {"case": "first", "rows": rows, "batch": BATCH, "workers": workers}
    return {**line, "seconds": round(seconds, 2)}


def memory(rows: int, workers: int, epochs: int) -> Line:
    """Resident memory after each epoch."""
    with data_set(rows) as folder:
        engine, feed = open_feed(folder, workers)
        steps, mib = rows // BATCH, []
        with contextlib.closing(feed):
            for epoch in range(epochs):
                read(engine, feed, range(epoch * steps, (epoch + 1) * steps))
                mib.append(resident_mib())
    half = mib[len(mib) // 2 :]
    slope = float(np.polyfit(np.arange(len(half)), half, 1)[0]) if len(half) > 1 else 0.0
    line: Line = {"case": "memory", "rows": rows, "epochs": epochs, "workers": workers}
    return {**line, "mib": [round(m) for m in mib], "grows": round(slope * 1e6 / rows, 1)}


def resident_mib() -> float:
    """Memory that this process and its workers hold."""
    return sum(process.memory_info().rss for process in processes()) / 2**20


def cpu_seconds() -> float:
    """Seconds of a core that this process and its workers have taken, the system's for them included."""
    times = [process.cpu_times() for process in processes()]
    return sum(each.user + each.system for each in times)


def processes() -> list[psutil.Process]:
    """This process and its workers."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def cases(flags: argparse.Namespace) -> dict[str, list[Callable[[], Line]]]:
    """Name → what to measure, in the order of the docstring."""
    sizes = sorted({1000, flags.rows})
    return {
        "rate": [lambda: rate(flags.rows, flags.workers, flags.repeats)],
        "first": [functools.partial(first, n, w) for w in sorted({0, flags.workers}) for n in sizes],
        "memory": [lambda: memory(flags.rows // 5, flags.workers, flags.epochs)],
    }


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", default="", help="one case; all of them without it")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the data set; a fifth for memory")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that read and tokenise; 0: a thread"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args(argv)
    if flags.rows < 10 * BATCH or min(flags.epochs, flags.repeats) < 1 or flags.workers < 0:
        raise UserError(
            f"--rows={flags.rows} --workers={flags.workers} --epochs={flags.epochs} "
            f"--repeats={flags.repeats}: at least {10 * BATCH} rows, 1 epoch and 1 repeat"
        )
    known = cases(flags)
    if flags.case and flags.case not in known:
        raise UserError(f"--case={flags.case}: must be one of {', '.join(known)}")
    for name in [flags.case] if flags.case else known:
        for measure in known[name]:
            print(json.dumps({"bench": "data", **measure()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
