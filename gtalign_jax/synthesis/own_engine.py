"""A teacher that is a model folder run by our own engine, on the mesh."""

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

ROWS = 32  # asks that are computed together


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A folder's engine, with ROWS in its batch buckets, and its parameters."""

    engine: Engine
    params: PyTree
    ending: Ending


def make(loaded: Loaded, max_tokens: int, asks: Sequence[Ask]) -> list[Made]:
    """The model's texts; what one ask draws follows from its prompt and seed. All hosts call it."""
    prompts = [engine_lib.encode(loaded.engine, messages_for(ask)) for ask in asks]
    fit = [i for i, prompt in enumerate(prompts) if engine_lib.fits(loaded.engine, prompt)]
    longest = loaded.engine.buckets.prompt[-1]
    made = [Made(None, f"prompt too long ({len(prompt)} tokens, over {longest})") for prompt in prompts]
    for rows in progress.batches(fit, ROWS):
        request = Request(
            engine_lib.prompt_batch(loaded.engine, [prompts[i] for i in rows]),
            jax.random.key(0),
            1,
            max_tokens,
            ending=loaded.ending,
            seeds=np.array([[asks[i].seed] for i in rows], np.int32),
        )
        written = processes.fetch(generate.rollout(loaded.engine, loaded.params, request).completions)
        texts, lengths = engine_lib.texts(loaded.engine, written), np.asarray(written.length).reshape(-1)
        finished = np.asarray(written.finished).reshape(-1)
        for row, i in enumerate(rows):
            text, reason = (texts[row], "") if finished[row] else (None, CUT)
            made[i] = Made(text, reason, len(prompts[i]), int(lengths[row]))
    return made
