"""A teacher that is a model folder run by our own engine, on the mesh."""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from gtalign_jax.mesh import processes
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generate
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.request import Ending, Request
from gtalign_jax.run import progress
from gtalign_jax.synthesis.ask import CUT, Ask, Made
from gtalign_jax.synthesis.prompts import messages_for
from gtalign_jax.types import PyTree

ROWS = 16  # asks that are computed together
SLOW = 10.0  # seconds before it is said how many are written


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A folder's engine, with ROWS in its batch buckets, and its parameters."""

    engine: Engine
    params: PyTree
    ending: Ending


def make(loaded: Loaded, max_tokens: int, asks: Sequence[Ask]) -> list[Made]:
    """The model's texts; what one ask draws follows from its prompt and seed. All hosts call it.

    Prompts of one bucket are computed together: an ask meets the same program whatever stands beside it.
    """
    engine = loaded.engine
    prompts = [engine_lib.encode(engine, messages_for(ask)) for ask in asks]
    longest, by_slots = engine.buckets.prompt[-1], collections.defaultdict[int, list[int]](list)
    made = [Made(None, f"prompt too long ({len(prompt)} tokens, over {longest})") for prompt in prompts]
    for i, prompt in enumerate(prompts):
        if engine_lib.fits(engine, prompt):
            by_slots[engine_lib.prompt_slots(engine, prompt)].append(i)
    batches = [rows for each in by_slots.values() for rows in progress.batches(each, ROWS)]
    done = 0
    with progress.stage(f"write {len(asks)} texts", len(asks), after=SLOW) as advance:
        for rows in batches:
            texts = _write(loaded, max_tokens, [prompts[i] for i in rows], [asks[i].seed for i in rows])
            for i, text in zip(rows, texts, strict=True):
                made[i] = text
            done += len(rows)
            advance(done)
    return made


def _write(
    loaded: Loaded, max_tokens: int, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
) -> list[Made]:
    """The texts of prompts of one bucket."""
    request = Request(
        engine_lib.prompt_batch(loaded.engine, prompts),
        jax.random.key(0),
        1,
        max_tokens,
        ending=loaded.ending,
        seeds=np.array([[seed] for seed in seeds], np.int32),
    )
    written = processes.fetch(generate.rollout(loaded.engine, loaded.params, request).completions)
    texts, finished = engine_lib.texts(loaded.engine, written), np.asarray(written.finished).reshape(-1)
    lengths = np.asarray(written.length).reshape(-1).tolist()
    return [
        Made(text if ended else None, "" if ended else CUT, len(prompt), length)
        for text, ended, prompt, length in zip(texts, finished, prompts, lengths, strict=True)
    ]
