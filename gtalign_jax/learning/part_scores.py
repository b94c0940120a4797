"""The experience of a rollout with its models run in micro-batches by token count (`rl.parts`).

Old and reference logprobs and values are computed for the parts of the first pass over the rollout, and put
where they belong; what follows from them is `experience.make_experience`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.learning.experience import Scores, make_experience, needs_scores, score_rollout
from gtalign_jax.learning.logprobs import Limit
from gtalign_jax.learning.microbatches import Part, Plan, Shape
from gtalign_jax.learning.parted import one_prompt, take_prompts
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.types import Experience, Packing, PyTree, Rollout


@dataclasses.dataclass(frozen=True, eq=False)
class PartScores:
    """What the models say of a rollout, computed by micro-batches; fixed: of `experience.score_rollout`."""

    fixed: Mapping[str, Any]

    def over(self, parts: Sequence[Part], rollout: Rollout, *models: PyTree, base: PyTree | None) -> Scores:
        """The scores of these parts' prompts; zeros elsewhere."""
        zeros, put = self.programs(rollout.completion.sharding)
        scores = zeros(rollout, *models, base)
        for part in parts:
            scores = put(part.shape, scores, rollout, part.rows, part.start, *models, base)
        return scores

    def compile(self, parts: Sequence[Part], rollout: Rollout, *models: PyTree, base: PyTree | None) -> None:
        """Make the programs that `over` calls for parts of these shapes."""
        zeros, put = self.programs(rollout.completion.sharding)
        scores = zeros(rollout, *models, base)
        for part in parts:
            put.lower(part.shape, scores, rollout, part.rows, part.start, *models, base).compile()

    @functools.cache  # noqa: B019 - lives as long as the experience function that it belongs to
    def programs(self, layout: Sharding) -> tuple[Callable, Callable]:
        """(zeros, put) that leave the scores laid out as the rollout."""
        zeros = jax.jit(self._zeros, out_shardings=layout)
        return zeros, jax.jit(self._put, static_argnums=0, donate_argnums=1, out_shardings=layout)

    def _of_part(self, shape: Shape, rollout: Rollout, rows, start, *models_base) -> Scores:
        *models, base = models_base
        part, packing = take_prompts(rollout, rows), Packing(start, shape)
        return score_rollout(part, *models, base=base, packing=packing, **self.fixed)

    def _zeros(self, rollout: Rollout, *models_base) -> Scores:
        any_part = functools.partial(self._of_part, rollout.completion.shape[1:])
        found = jax.eval_shape(any_part, rollout, *one_prompt(rollout), *models_base)
        return jax.tree.map(lambda x: jnp.zeros((len(rollout.prompt), *x.shape[1:]), x.dtype), found)

    def _put(self, shape: Shape, scores: Scores, rollout: Rollout, rows, start, *models_base) -> Scores:
        found = self._of_part(shape, rollout, rows, start, *models_base)
        return jax.tree.map(lambda x, new: x.at[rows].set(new, mode="drop"), scores, found)


def make_parted_experience(
    model: ModelConfig,
    config: AlgorithmConfig,
    temperature: float,
    limit: Limit | None = None,
    old_from_sampler: bool = False,
) -> Callable[..., Experience]:
    """`experience.make_experience` with its models run by parts, jitted; one more keyword, plan."""
    fixed = {"model": model, "config": config, "temperature": temperature, "limit": limit}
    fixed["old_from_sampler"] = old_from_sampler
    whole = jax.jit(functools.partial(make_experience, **fixed))
    part_scores = PartScores(fixed)
    compiled: set[tuple[int, ...]] = set()

    def experience(rollout, reward, valid, *models, base=None, plan: Plan, **extra) -> Experience:
        if not needs_scores(config, old_from_sampler, *models):
            return whole(rollout, reward, valid, *models, base=base, **extra)
        parts = [part for parts in plan.updates[: config.minibatches] for part in parts]
        if rollout.prompt.shape not in compiled:
            compiled.add(rollout.prompt.shape)
            part_scores.compile(plan.empty, rollout, *models, base=base)
        scores = part_scores.over(parts, rollout, *models, base=base)
        return whole(rollout, reward, valid, *models, base=base, scores=scores, **extra)

    return experience
