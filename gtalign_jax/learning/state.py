"""Optimizers and the making of a train state."""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from gtalign_jax.errors import INF, MAX_COUNT, in_range, positive
from gtalign_jax.learning.muon import muon
from gtalign_jax.types import Array, Completions, ModelState, PyTree, TrainState


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """name: `adamw`, or `muon` for the kernels of the blocks and AdamW for the rest (`learning.muon`).

    lr is the peak, of both alike; `schedule` is `constant` or `cosine`, which ends at `final` x lr after the
    phase's steps. warmup: steps from zero to the peak. clip_norm: bound on the global gradient norm (0:
    none). offload: the moments wait in the host's memory and are on the devices during an update only.
    """

    name: str = "adamw"
    lr: float = 1e-6
    schedule: str = "constant"
    final: float = 0.1
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    offload: bool = False

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"name={self.name!r}: must be adamw or muon")
        if self.name == "muon" and self.offload:
            raise ValueError("offload=True: the moments of adamw alone can wait in the host's memory")
        if self.name == "muon" and self.eps != OptimizerConfig.eps:
            raise ValueError(f"eps={self.eps}: of adamw alone; leave it out with muon")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule={self.schedule!r}: must be constant or cosine")
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr}: must be positive")
        positive(self, "lr", "eps")
        in_range(self, warmup=(0, MAX_COUNT), weight_decay=(0, INF), clip_norm=(0, INF))
        in_range(self, betas=(0, 1), final=(0, 1))
        if len(self.betas) != 2 or max(self.betas) >= 1:
            raise ValueError(f"betas={self.betas}: give two numbers in [0, 1)")


@functools.lru_cache(maxsize=32)
def make_optimizer(config: OptimizerConfig, steps: int) -> Optimizer:
    """The optimizer of a phase of `steps` updates; equal ones are one, so that they share their programs.

    0 stands for steps that nobody has counted yet: the state has the same shapes.
    """
    if config.schedule == "cosine":
        first, steps = 0.0 if config.warmup else config.lr, max(steps, config.warmup + 1)
        last = config.lr * config.final
        rate = optax.warmup_cosine_decay_schedule(first, config.lr, config.warmup, steps, last)
    else:
        rate = optax.linear_schedule(
            config.lr if not config.warmup else 0.0, config.lr, max(config.warmup, 1)
        )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.name == "muon":
        return optax.chain(clip, muon(rate, config.betas, config.weight_decay))
    adam = optax.adamw(rate, *config.betas, eps=config.eps, weight_decay=config.weight_decay, mask=_matrices)
    return Streamed(clip, adam) if config.offload else optax.chain(clip, adam)


def _matrices(params: PyTree) -> PyTree:
    """Which parameters decay."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """An optimizer whose moments wait in the host's memory, to be taken from there a parameter at a time.

    whole: what needs all gradients at once and keeps nothing (the clipping). each: what treats every
    parameter by itself. `gradients.apply` makes the step.
    """

    whole: optax.GradientTransformation
    each: optax.GradientTransformation

    def init(self, params: PyTree) -> PyTree:
        """The first state of `each`: arrays in the host's memory, split as their parameters."""
        state = self.each.init(params)
        return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim else x, state)


Optimizer: TypeAlias = optax.GradientTransformation | Streamed


def init_model(params: PyTree, optimizer: Optimizer) -> ModelState:
    """Parameters with the first state of their optimizer."""
    return ModelState(params=params, opt_state=optimizer.init(params))


def init_state(
    key: Array,
    policy: ModelState,
    critic: ModelState | None = None,
    *,
    kl_coef: float | None = None,
    reference: PyTree | None = None,
    waiting: Completions | None = None,
) -> TrainState:
    """A state at step 0. critic: for algorithms with a value model.

    kl_coef: where an adaptive controller starts. reference: of a run that refreshes it; copied, because
    a donated state must not hold an array twice. waiting: see `TrainState`.
    """
    return TrainState(
        policy=policy,
        critic=critic,
        step=jnp.zeros((), jnp.int32),
        rng=key,
        kl_coef=None if kl_coef is None else jnp.asarray(kl_coef, jnp.float32),
        reference=None if reference is None else jax.tree.map(jnp.copy, reference),
        waiting=None if waiting is None else jax.tree.map(jnp.asarray, waiting),
    )
