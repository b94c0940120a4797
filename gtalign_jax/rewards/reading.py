"""Per-completion text work, alone or spread over processes: no JAX, no judge, only picklable values.

Worker processes are spawned, never forked: forking a process that runs JAX threads can deadlock.
"""

import functools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from gtalign_jax.chain.parse import Chain, parse_chain, plain_chain
from gtalign_jax.rewards.tasks.task import AnswerScore, Score, clamped_score

CHUNK = 256
_SPACE = bytes(code < 128 and chr(code).isspace() for code in range(256))
A = TypeVar("A")
R = TypeVar("R")


class Reading(NamedTuple):
    """A completion's chain, and the characters before its first <response>: what the user waits for."""

    chain: Chain
    reasoning_chars: int


def read(text: str, code_fences: bool = False) -> Reading:
    """Parse a completion that follows the protocol."""
    start = text.find("<response>")
    return Reading(parse_chain(text, code_fences), start if start >= 0 else len(text))


def read_plain(text: str) -> Reading:
    """A plain answer: nothing stands before the response."""
    return Reading(plain_chain(text), 0)


def count_words(texts: Sequence[str | None]) -> np.ndarray:
    """White-space words [B] int64 of each text, as `str.split` counts them; None has none."""
    parts = [texts[i : i + CHUNK] for i in range(0, len(texts), CHUNK)]
    return np.concatenate([np.zeros(0, np.int64), *(_count([t or "" for t in part]) for part in parts)])


def _count(texts: list[str]) -> np.ndarray:
    """ASCII texts are counted together: a word starts where a byte is no white space and the last one is."""
    joined = " ".join(texts)
    if not joined.isascii():
        counts = _count([text if text.isascii() else "" for text in texts])
        for i, text in enumerate(texts):
            if not text.isascii():
                counts[i] = len(text.split())
        return counts
    space = np.frombuffer((" " + joined).encode("ascii").translate(_SPACE), bool)
    starts = np.flatnonzero(space[:-1] > space[1:])
    ends = np.cumsum([len(text) + 1 for text in texts])
    return np.diff(np.searchsorted(starts, ends), prepend=0)


class Answer(NamedTuple):
    """A judged response: its task's score and scale, and what they are asked about."""

    score: Score
    ends: tuple[float, float]
    verdict: float
    response: str
    truth: str


def score(answer: Answer) -> AnswerScore:
    """The answer score of a judged response."""
    return clamped_score(*answer)


def spread(function: Callable[[A], R], inputs: Sequence[A], workers: int) -> list[R]:
    """[function(x) for x in inputs] in order, over `workers` processes when there is enough to share."""
    if workers <= 0 or len(inputs) <= CHUNK:
        return [function(x) for x in inputs]
    chunks = [inputs[i : i + CHUNK] for i in range(0, len(inputs), CHUNK)]
    parts = _pool(workers).map(functools.partial(_apply, function), chunks)
    return [result for part in parts for result in part]


def _apply(function: Callable[[A], R], inputs: Sequence[A]) -> list[R]:
    return [function(x) for x in inputs]


@functools.lru_cache(maxsize=2)
def _pool(workers: int) -> ProcessPoolExecutor:
    """One pool for the life of the process: starting it costs seconds."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
