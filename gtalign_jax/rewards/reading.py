"""Per-completion text work, alone or spread over processes: no JAX, no judge, only picklable values.

Worker processes are spawned, never forked: forking a process that runs JAX threads can deadlock.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple, TypeVar

from gtalign_jax.chain.parse import Chain, parse_chain, plain_chain
from gtalign_jax.rewards.tasks import AnswerScore, answer_score

CHUNK = 256
HEAVY_TASKS = ("medium",)
A, R = TypeVar("A"), TypeVar("R")


class Reading(NamedTuple):
    """A completion's chain and lengths.

    reasoning_chars: characters before the first <response>, which is what the user waits for.
    response_words, total_words: white-space words.
    """

    chain: Chain
    reasoning_chars: int
    response_words: int
    total_words: int


class Answer(NamedTuple):
    """What one answer score is made from."""

    task: str
    verdict: float
    response: str
    truth: str


def read(text: str, code_fences: bool = False) -> Reading:
    """Parse and measure a completion that follows the protocol."""
    chain = parse_chain(text, code_fences)
    start = text.find("<response>")
    return Reading(chain, start if start >= 0 else len(text), words(chain.response), words(text))


def read_plain(text: str) -> Reading:
    """Measure a plain answer: nothing stands before the response."""
    chain = plain_chain(text)
    count = words(text)
    return Reading(chain, 0, count, count)


def words(text: str | None) -> int:
    """White-space words."""
    return len(text.split()) if text else 0


def score(answer: Answer) -> AnswerScore:
    """The answer score of one verdict."""
    return answer_score(*answer)


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
