"""Supervised fine-tuning: the mean negative log-probability of the demonstrations' tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gtalign_jax.learning import gradients
from gtalign_jax.learning.logprobs import Objective, TokenScores, packed_scores, token_scores
from gtalign_jax.learning.update import on_base
from gtalign_jax.learning.vocabulary import Reading
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.types import Array, PyTree, Ratio, TrainState


@flax.struct.dataclass
class SftBatch:
    """prompt [P, S], prompt_length [P], completion [P, G, N], mask [P, G, N] bool: tokens to learn."""

    prompt: Array
    prompt_length: Array
    completion: Array
    mask: Array


@flax.struct.dataclass
class PackedBatch:
    """Several chains a row: tokens, segments, positions [B, T] int32; learn [B, T] bool: of completions."""

    tokens: Array
    segments: Array
    positions: Array
    learn: Array


def make_sft_update(
    model: ModelConfig, optimizer: optax.GradientTransformation, microbatches: int = 1
) -> Callable[..., tuple[TrainState, dict[str, Ratio]]]:
    """The jitted SFT step (state, batch, base=None) → (state, metrics); the state is donated.

    batch: an `SftBatch`, or a `PackedBatch`. base: what the trained adapters stand on, see
    `rl.update.make_update`.
    """

    def update(
        state: TrainState, batch: SftBatch | PackedBatch, base: PyTree | None = None
    ) -> tuple[TrainState, dict[str, Ratio]]:
        of_batch = packed_loss if isinstance(batch, PackedBatch) else sft_loss
        loss = on_base(functools.partial(of_batch, model=model), base)
        grads, metrics = gradients.accumulate(loss, state.policy.params, batch, microbatches)
        policy, step_metrics = gradients.apply(state.policy, grads, optimizer)
        return state.replace(policy=policy, step=state.step + 1), metrics | step_metrics

    return jax.jit(update, donate_argnums=0)


def sft_loss(params: PyTree, batch: SftBatch, *, model: ModelConfig) -> tuple[Ratio, dict[str, Ratio]]:
    """Summed cross-entropy over the mask with its token count."""
    args = (batch.prompt, batch.prompt_length, batch.completion)
    learnt = Objective(_cross_entropy, batch.mask)
    return _means(token_scores(params, model, *args, Reading(), objective=learnt), batch.mask)


def packed_loss(params: PyTree, batch: PackedBatch, *, model: ModelConfig) -> tuple[Ratio, dict[str, Ratio]]:
    """`sft_loss` of packed chains: the same sum over the same tokens."""
    mask = batch.learn[:, 1:]  # a completion follows its prompt, so the token before is its own
    args = (batch.tokens, batch.segments, batch.positions, Objective(_cross_entropy, mask))
    return _means(packed_scores(params, model, *args), mask)


def _cross_entropy(logp: Array, entropy: Array, mask: Array) -> Array:
    del entropy
    return jnp.where(mask, -logp, 0.0)


def _means(scored: TokenScores, mask: Array) -> tuple[Ratio, dict[str, Ratio]]:
    loss = Ratio(scored.total, jnp.sum(mask).astype(jnp.float32))
    return loss, {"loss/sft": loss, "entropy/mean": gradients.mean_columns(scored.entropy, mask)}
