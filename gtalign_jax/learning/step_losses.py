"""The losses of a mini-batch under the parameters that are trained: one model pass, then the formulas."""

import functools

import jax
import jax.numpy as jnp

from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.learning.gradients import Metrics, mean_columns
from gtalign_jax.learning.logprobs import Objective, TokenScores, token_scores
from gtalign_jax.learning.losses import (
    Columns,
    kl_estimate,
    loss_weights,
    policy_loss,
    policy_terms,
    value_loss,
)
from gtalign_jax.learning.packing import in_packed_rows
from gtalign_jax.learning.spec import Spec
from gtalign_jax.models.heads import token_values
from gtalign_jax.models.transformer import Segments
from gtalign_jax.types import Array, Experience, PyTree, Ratio


def policy_step_loss(
    params: PyTree, batch: Experience, *, spec: Spec, kl_coef: Array | None = None
) -> tuple[Ratio, Metrics]:
    """`policy_loss` of a mini-batch under `params`, and how far the sampler was from the trainer.

    kl_coef []: in place of the config's, when a controller moves it.
    """
    config, written = spec.algorithm, batch.completions
    columns = Columns(
        advantage=batch.advantage,
        mask=written.action_mask,
        ref_logp=batch.ref_logp,
        is_weight=batch.is_weight,
        kl_coef=None if kl_coef is None else jnp.full_like(batch.advantage, kl_coef),
    )
    here = config.on_policy and not spec.old_from_sampler
    weight, count = loss_weights(columns.mask, config)

    def score(rows: Array, given: PyTree, segments: Segments | None) -> TokenScores:
        at, of_tokens = given
        added = Objective(functools.partial(_weighted_terms, config), of_tokens) if config.by_token else None
        return token_scores(params, spec.model, batch.prompts, rows, spec.head, at, segments, added)

    given = (batch.limit, (weight, None if here else batch.old_logp, columns))
    scored = in_packed_rows(score, batch.packing, written.tokens, written.length, given)
    old_logp = jax.lax.stop_gradient(scored.logp) if here else batch.old_logp
    loss, metrics = policy_loss(scored.logp, old_logp, columns, config, scored.entropy)
    if config.by_token:  # the same number, with the gradient that came with the scores
        loss = Ratio(scored.total, count)
    # Sampler and trainer compute the same distribution in different programs: both stay near 0, unless
    # the sampler is one update behind.
    trainer = jax.lax.stop_gradient(scored.logp) if spec.old_from_sampler else old_logp
    metrics["sampler/gap"] = mean_columns(jnp.abs(trainer - written.logp), columns.mask)
    metrics["kl/sampler"] = mean_columns(kl_estimate(written.logp, trainer, "k3"), columns.mask)
    return loss, metrics | _fluency(batch, config.fluency_floor)


def _fluency(batch: Experience, floor: float) -> Metrics:
    """How likely the reference finds the responses that are trained on, nats per token, and the share of them
    under the floor."""
    if batch.fluency is None:
        return {}
    trained = jnp.any(batch.completions.action_mask, axis=-1)  # not the rows that fill a micro-batch up
    total, count = (jnp.where(trained, x, 0.0) for x in (batch.fluency.total, batch.fluency.count))
    found: Metrics = {"fluency/mean": Ratio(total.sum(), count.sum())}
    if floor < 0:
        poor, told = (jnp.sum(rows, dtype=jnp.float32) for rows in (total < floor * count, count > 0))
        found["fluency/floored"] = Ratio(poor, told)
    return found


def _weighted_terms(config: AlgorithmConfig, logp: Array, entropy: Array, of_tokens: PyTree) -> Array:
    """What each token adds to the total of `policy_loss`."""
    weight, old_logp, columns = of_tokens
    old_logp = jax.lax.stop_gradient(logp) if old_logp is None else old_logp
    loss, _ = policy_terms(logp, old_logp, columns, config, entropy)
    return jnp.where(columns.mask, loss, 0.0) * weight


def value_step_loss(params: PyTree, batch: Experience, *, spec: Spec) -> tuple[Ratio, Metrics]:
    """`value_loss` of a mini-batch under the critic's `params`, and what explained variance is made of."""
    prompts, written = batch.prompts, batch.completions

    def score(rows: Array, _: PyTree, segments: Segments | None) -> Array:
        return token_values(params, spec.model, prompts.tokens, prompts.length, rows, segments)

    returns = batch.returns
    assert returns is not None  # a critic's experience has them
    value = in_packed_rows(score, batch.packing, written.tokens, written.length)
    mask = written.action_mask
    loss, clipped = value_loss(value, batch.old_value, returns, mask, spec.algorithm.value_clip)
    return loss, {
        "loss/value": loss,
        "value/error": mean_columns((value - returns) ** 2, mask),
        "value/return": mean_columns(returns, mask),
        "value/return_square": mean_columns(returns**2, mask),
        "value/clipped": mean_columns(clipped.astype(jnp.float32), mask),
    }
