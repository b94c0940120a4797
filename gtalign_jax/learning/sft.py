"""Supervised fine-tuning: the mean negative log-probability of the demonstrations' tokens."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from gtalign_jax.learning import gradients
from gtalign_jax.learning.gradients import Metrics
from gtalign_jax.learning.logprobs import Objective, TokenScores, packed_scores, token_scores
from gtalign_jax.learning.state import Optimizer
from gtalign_jax.learning.update import on_base
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.types import Array, PromptBatch, PyTree, Ratio, TrainState


@dataclasses.dataclass(frozen=True)
class SftSetup:
    """What a step of the cold start depends on besides arrays."""

    model: ModelConfig
    optimizer: Optimizer
    microbatches: int = 1


class SftBatch(flax.struct.PyTreeNode):
    """prompts [P, S]; tokens [P, G, N] int32; mask [P, G, N] bool: those to learn; weight [P, G, N] float32:
    of each in the mean (None: all alike)."""

    prompts: PromptBatch
    tokens: Array
    mask: Array
    weight: Array | None = None


class PackedBatch(flax.struct.PyTreeNode):
    """Several chains a row: tokens, segments, positions [B, T] int32; learn [B, T] bool: of completions;
    weight [B, T] float32 as in `SftBatch`."""

    tokens: Array
    segments: Array
    positions: Array
    learn: Array
    weight: Array | None = None


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def sft_update(
    setup: SftSetup, state: TrainState, batch: SftBatch | PackedBatch, base: PyTree | None = None
) -> tuple[TrainState, Metrics]:
    """(state, metrics) after one step; the state is donated.

    base: what the trained adapters stand on (`models.lora`).
    """
    of_batch = packed_loss if isinstance(batch, PackedBatch) else sft_loss
    loss = on_base(functools.partial(of_batch, model=setup.model), base)
    sums = gradients.accumulate(loss, state.policy.params, batch, setup.microbatches)
    policy, metrics = gradients.apply(state.policy, gradients.mean_gradient(sums), setup.optimizer)
    return state.replace(policy=policy, step=state.step + 1), sums.metrics | metrics


def sft_loss(params: PyTree, batch: SftBatch, *, model: ModelConfig) -> tuple[Ratio, Metrics]:
    """Summed cross-entropy over the mask with its token count, both weighted."""
    learnt = _objective(batch.mask, batch.weight)
    scored = token_scores(params, model, batch.prompts, batch.tokens, objective=learnt)
    return _means(scored, batch.mask, learnt)


@functools.partial(jax.jit, static_argnames="model")
def mean_loss(params: PyTree, batch: SftBatch, *, model: ModelConfig) -> Ratio:
    """`sft_loss` alone, of all parameters."""
    return sft_loss(params, batch, model=model)[0]


def packed_loss(params: PyTree, batch: PackedBatch, *, model: ModelConfig) -> tuple[Ratio, Metrics]:
    """`sft_loss` of packed chains: the same sum over the same tokens."""
    mask = batch.learn[:, 1:]  # a completion follows its prompt, so the token before is its own
    learnt = _objective(mask, None if batch.weight is None else batch.weight[:, 1:])
    args = (batch.tokens, batch.segments, batch.positions, learnt)
    return _means(packed_scores(params, model, *args), mask, learnt)


def _objective(mask: Array, weight: Array | None) -> Objective:
    """What the tokens of a mask add to the loss; its columns sum up to their number, or their weights."""
    if weight is None:
        return Objective(_cross_entropy, mask)
    return Objective(_weighted_cross_entropy, jnp.where(mask, weight, 0.0))


def _cross_entropy(logp: Array, entropy: Array, mask: Array) -> Array:
    del entropy
    return jnp.where(mask, -logp, 0.0)


def _weighted_cross_entropy(logp: Array, entropy: Array, weight: Array) -> Array:
    del entropy
    return jnp.where(weight > 0, -logp * weight, 0.0)


def _means(scored: TokenScores, mask: Array, learnt: Objective) -> tuple[Ratio, Metrics]:
    loss = Ratio(scored.total, jnp.sum(learnt.columns).astype(jnp.float32))
    return loss, {"loss/sft": loss, "entropy/mean": gradients.mean_columns(scored.entropy, mask)}
