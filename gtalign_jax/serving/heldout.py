"""The held-out prompts of a job, steered at several prices."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from gtalign_jax.rollout.sampling import GREEDY
from gtalign_jax.run.job import Job
from gtalign_jax.run.progress import batches, stage
from gtalign_jax.serving.splice import UNSTEERED
from gtalign_jax.serving.steer import Options, steer, stop_ending
from gtalign_jax.serving.sweep import Point, Pricing, point_edit, point_lines
from gtalign_jax.types import PyTree


def steer_heldout(
    job: Job, params: PyTree, pricing: Pricing, points: Sequence[Point]
) -> Iterator[dict[str, Any]]:
    """`point_lines` of every held-out prompt of a run, decoded greedily: points differ by the edit alone.

    id: the place of the prompt; input: what the user asked. A matrix that cannot be read is not edited.
    """
    count = min(job.settings.evaluate.prompts, len(job.test.items))
    buckets = dataclasses.replace(job.engine.buckets, batch=(count,))
    engine = dataclasses.replace(job.engine, sampling=GREEDY, buckets=buckets)
    edits = [point_edit(pricing, point) for point in points]
    options = Options(job.settings.max_new_tokens, unusable=UNSTEERED)
    stop, asked = stop_ending(engine), zip(job.test.items, job.test.tokens, strict=True)
    with stage("steer the held-out prompts", len(job.test.items)) as advance:
        for number, part in enumerate(batches(asked, count)):
            tokens = [ids for _, ids in part]
            steered = steer(
                engine,
                params,
                tokens,
                edits,
                jax.random.key(0),
                options,
                stop=stop,
                constraint=job.generator.constraint,
            )
            for i, ((item, _), each) in enumerate(zip(part, steered, strict=True)):
                said = {"id": number * count + i, "input": item.messages[-1]["content"]}
                yield from ({**said, **fields} for fields in point_lines(each, pricing, points))
            advance(number * count + len(part))
