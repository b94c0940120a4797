"""What the models say of a rollout before the update: log-probabilities and values, in one pass each."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.learning.logprobs import token_logprobs
from gtalign_jax.learning.packing import in_packed_rows
from gtalign_jax.learning.spec import Spec
from gtalign_jax.models import lora
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.heads import token_values
from gtalign_jax.models.transformer import Segments
from gtalign_jax.types import Array, Completions, Models, Packing, PromptBatch, PyTree, Rollout


class Scores(flax.struct.PyTreeNode):
    """old_logp, ref_logp and value [P, G, N], bootstrap [P, G], the value after the last token of rows cut
    short. None where nothing reads it."""

    old_logp: Array | None
    ref_logp: Array | None
    value: Array | None
    bootstrap: Array | None


def needs_scores(spec: Spec, models: Models) -> bool:
    """Whether any of the models has something to say before the update."""
    config = spec.algorithm
    refers = config.needs_reference and models.reference is not None
    return bool(spec.reads_old or refers or config.needs_critic)


def score_rollout(
    spec: Spec, models: Models, rollout: Rollout, packing: Packing | None = None, parts: int = 1
) -> Scores:
    """What the models say of a rollout.

    packing: rows to read instead of the padded ones. parts: how many calls of a model it is cut into.
    """
    config, written = spec.algorithm, rollout.completions
    at = None if spec.limit is None else spec.limit.states(written)
    args = (rollout.prompts, written.tokens, written.length, at, packing)

    def logprobs(params: PyTree) -> Array:
        def of(prompts: PromptBatch, tokens: Array, length: Array, at: PyTree, packing: Packing) -> Array:
            def score(rows: Array, at: PyTree, segments: Segments | None) -> Array:
                return token_logprobs(params, spec.model, prompts, rows, spec.head, at, segments)[0]

            return in_packed_rows(score, packing, tokens, length, at)

        return in_parts(of, parts, *args)

    old_logp = ref_logp = None
    if spec.reads_old:
        old_logp = logprobs(lora.join(models.base, models.policy))
    if config.needs_reference and models.reference is not None:
        ref_logp = logprobs(lora.join(models.base, models.reference))
    value = bootstrap = None
    if config.needs_critic:
        critic = lora.join(lora.value_base(models.base), models.critic)
        value, bootstrap = _values(critic, rollout, spec.model, config, packing, parts)
    return Scores(old_logp, ref_logp, value, bootstrap)


def in_parts(function: Callable[..., Any], parts: int, *arrays: PyTree) -> Any:
    """function(*arrays) of arrays [P, ...] or trees of them, computed for P / parts prompts at a time.

    A part takes every `parts`-th prompt, so that each device computes rows that it holds.
    """
    if parts == 1 or jax.tree.leaves(arrays)[0].shape[0] % parts:
        return function(*arrays)
    cut = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), arrays)
    found = jax.lax.map(lambda xs: function(*xs), cut)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), found)


def _values(
    critic: PyTree,
    rollout: Rollout,
    model: ModelConfig,
    config: AlgorithmConfig,
    packing: Packing | None,
    parts: int,
) -> tuple[Array, Array | None]:
    """(V before each token [P, G, N], V after the last token of truncated rows [P, G])."""

    def of(prompts: PromptBatch, tokens: Array, length: Array, packing: Packing | None) -> Array:
        def score(rows: Array, _: PyTree, segments: Segments | None) -> Array:
            return token_values(critic, model, prompts.tokens, prompts.length, rows, segments)

        return in_packed_rows(score, packing, tokens, length)

    written: Completions = rollout.completions
    if not config.bootstrap_truncated:
        return in_parts(of, parts, rollout.prompts, written.tokens, written.length, packing), None
    # One more column: the state after token N - 1 predicts a token that is not there.
    longer = jnp.pad(written.tokens, ((0, 0), (0, 0), (0, 1)))
    value = in_parts(of, parts, rollout.prompts, longer, written.length + 1, packing)
    after = jnp.take_along_axis(value, written.length[..., None], axis=-1)[..., 0]
    return value[..., :-1], jnp.where(written.finished, 0.0, after)
