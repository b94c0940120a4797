"""Supervised fine-tuning: the mean negative log-probability of the demonstrations' tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import optax

from gtalign_jax.models.config import ModelConfig
from gtalign_jax.rl import gradients
from gtalign_jax.rl.logprobs import token_logprobs
from gtalign_jax.rl.update import on_base
from gtalign_jax.types import Array, PyTree, Ratio, TrainState


@flax.struct.dataclass
class SftBatch:
    """prompt [P, S], prompt_length [P], completion [P, G, N], mask [P, G, N] bool: tokens to learn."""

    prompt: Array
    prompt_length: Array
    completion: Array
    mask: Array


def make_sft_update(
    model: ModelConfig, optimizer: optax.GradientTransformation, microbatches: int = 1
) -> Callable[..., tuple[TrainState, dict[str, Ratio]]]:
    """The jitted SFT step (state, batch, base=None) → (state, metrics); the state is donated.

    base: what the trained adapters stand on, see `rl.update.make_update`.
    """
    loss_fn = functools.partial(sft_loss, model=model)

    def update(
        state: TrainState, batch: SftBatch, base: PyTree | None = None
    ) -> tuple[TrainState, dict[str, Ratio]]:
        loss = on_base(loss_fn, base)
        grads, metrics = gradients.accumulate(loss, state.policy.params, batch, microbatches)
        policy, step_metrics = gradients.apply(state.policy, grads, optimizer)
        return state.replace(policy=policy, step=state.step + 1), metrics | step_metrics

    return jax.jit(update, donate_argnums=0)


def sft_loss(params: PyTree, batch: SftBatch, *, model: ModelConfig) -> tuple[Ratio, dict[str, Ratio]]:
    """Summed cross-entropy over the mask with its token count."""
    logp, entropy = token_logprobs(params, model, batch.prompt, batch.prompt_length, batch.completion)
    loss = gradients.mean_columns(-logp, batch.mask)
    return loss, {"loss/sft": loss, "entropy/mean": gradients.mean_columns(entropy, batch.mask)}
