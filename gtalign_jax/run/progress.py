"""Progress of a long job on stderr: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

# What is shown, in order: the keys to look for (the first present wins), then how it reads.
_SHOWN = (
    (("loss/policy", "loss/sft"), "loss {:.3f}"),
    (("reward/welfare",), "W {:.3f}"),
    (("reward/format",), "format {:.0%}"),
    (("tokens_per_s",), "{:,.0f} tok/s"),
    (("prompts_per_min",), "{:,.1f} prompts/min"),
    (("tokens_written",), "{:,.0f} tokens"),
    (("cost",), "cost {:,.2f}"),
    (("given_up",), "{:.0f} given up"),
)


def format_values(values: Mapping[str, float]) -> str:
    """Loss, welfare, format rate and tokens per second, as far as they are in `values`."""
    parts = []
    for keys, text in _SHOWN:
        found = [float(values[k]) for k in keys if k in values]
        if found:
            parts.append(text.format(found[0]))
    return "  ".join(parts)


def format_seconds(seconds: float) -> str:
    """`1:02:03` or `2:03`; `-` when it is not known yet."""
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


class Progress:
    """Steps done of a phase, with its newest metrics and the time left; a context manager.

    The time left is the mean step time since the first step shown here, which holds the compilation,
    times the steps to go.
    """

    def __init__(
        self,
        name: str,
        total: int,
        initial: int = 0,
        *,
        line_seconds: float = 10.0,
        stream: TextIO = sys.stderr,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """name: shown first. line_seconds: the least time between two plain lines."""
        self._name, self._total, self._done = name, total, initial
        self._line_seconds, self._stream, self._clock = line_seconds, stream, clock
        self._first: tuple[int, float] | None = None
        self._last_line = -math.inf
        self._bar = None
        if stream.isatty():
            layout = name + " {n_fmt}/{total_fmt} |{bar}| {desc}"
            self._bar = tqdm(total=total, initial=initial, file=stream, bar_format=layout, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, values: Mapping[str, float]) -> None:
        """`done` steps of the total are finished; values: the newest step's metrics."""
        now = self._clock()
        self._first = self._first or (done, now)
        text = f"{format_values(values)}  {format_seconds(self._seconds_left(done, now))} left".strip()
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(done - self._done)
        elif now - self._last_line >= self._line_seconds or done >= self._total:
            self._last_line = now
            print(f"{self._name} {done}/{self._total}  {text}", file=self._stream, flush=True)
        self._done = done

    def say(self, text: str) -> None:
        """A line of its own above the bar, such as a health warning."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def _seconds_left(self, done: int, now: float) -> float:
        first_step, first_time = self._first or (done, now)
        if done <= first_step:
            return 0.0 if done >= self._total else math.nan
        return (now - first_time) / (done - first_step) * (self._total - done)


@contextlib.contextmanager
def stage(
    name: str,
    total: int = 0,
    *,
    after: float = 2.0,
    line_seconds: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
    done: Callable[[], int] | None = None,
) -> Iterator[Callable[[int], None]]:
    """A part of a job that has no bar: it says its name on stderr once it takes over `after` seconds, and
    when it is done. Yields advance(done), which tells how much of `total` is behind, every `line_seconds`.

    done: how much is behind, of a part that cannot tell by itself; it is asked every `line_seconds`.
    """
    began = last = clock()
    said, over = threading.Event(), threading.Event()

    def say(text: str) -> None:
        said.set()
        tqdm.write(text, file=sys.stderr)  # above a bar, where there is one
        sys.stderr.flush()

    def advance(behind: int) -> None:
        nonlocal last
        now = clock()
        if 0 < behind < total and now - last >= line_seconds:
            last = now
            left = (now - began) / behind * (total - behind)
            say(f"{name} {behind}/{total}  {format_seconds(left)} left")

    def watch() -> None:
        if not over.wait(after):
            say(f"{name} ...")
            while done is not None and not over.wait(line_seconds):
                advance(done())

    watcher = threading.Thread(target=watch, name=f"stage {name}", daemon=True)
    watcher.start()
    try:
        yield advance
    finally:
        over.set()
        watcher.join()  # what it says comes before the line below
    if said.is_set():
        say(f"{name}: done in {format_seconds(clock() - began)}")


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def counted(batch_list: Iterable[list[T]], name: str, line_seconds: float = 10.0) -> Iterator[list[T]]:
    """The same batches, with the lines done so far on stderr: a counter on a terminal, else plain lines."""
    done, last = 0, time.monotonic()
    with tqdm(desc=name, unit=" lines", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        for batch in batch_list:
            yield batch
            done += len(batch)
            bar.update(len(batch))
            if bar.disable and time.monotonic() - last >= line_seconds:
                last = time.monotonic()
                print(f"{name} {done} lines", file=sys.stderr, flush=True)
    print(f"{name}: {done} lines done", file=sys.stderr, flush=True)
