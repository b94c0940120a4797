"""A prompt before its answer: its text, and what the model thought of its tokens."""

import asyncio
import math
from collections.abc import Sequence

from gtalign_jax.rollout import continuous
from gtalign_jax.rollout.continuous import Places
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.prompt_scores import PromptScores
from gtalign_jax.serving.server.ask import ApiError
from gtalign_jax.serving.server.scheduler import Closed, Scheduler
from gtalign_jax.serving.server.text import Piece, TextStream


async def echo(scheduler: Scheduler, places: Places, prompt: Sequence[int], scored: bool) -> Piece:
    """A prompt as the model reads it, special tokens and all. scored: with its tokens' log-probabilities."""
    scores = None
    if scored:
        try:
            scores = await asyncio.wrap_future(scheduler.compute(lambda: continuous.score(places, prompt)))
        except Closed as error:
            raise ApiError(503, str(error), retry_s=5) from error
    # In a thread: thousands of tokens become text one by one, and the others would wait.
    return await asyncio.to_thread(_spoken, places.engine, prompt, scores)


def _spoken(engine: Engine, prompt: Sequence[int], scores: PromptScores | None) -> Piece:
    stream = TextStream(engine)
    if scores is None:
        first = stream.feed(prompt, [math.nan] * len(prompt))
    else:
        beside = zip(scores.likely.tolist(), scores.likely_logp.tolist(), strict=True)
        likely = [tuple(zip(*pair, strict=True)) for pair in beside]
        first = stream.feed(prompt, [math.nan, *scores.logp.tolist()], [(), *likely])
    last = stream.end()
    return Piece(first.text + last.text, first.tokens + last.tokens)
