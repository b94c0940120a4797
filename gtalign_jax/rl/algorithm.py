"""An algorithm is a choice of small functions: its settings, and the named presets."""

from __future__ import annotations

import dataclasses
import importlib

from gtalign_jax.errors import UserError

_CHOICES = {
    "advantage": ("group", "gae"),
    "scale": ("std", "none", "rloo", "batch"),
    "loss": ("clip", "cispo"),
    "ratio": ("token", "sequence"),
    "aggregation": ("token", "sequence", "constant"),
    "kl_place": ("loss", "reward"),
    "kl_estimator": ("k1", "k2", "k3"),
}


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    """One policy update, composed. PPO and GRPO differ in `advantage` and nothing structural.

    advantage: `group` (samples of one prompt are each other's baseline, see `scale`) or `gae` (critic,
    gamma, lam; whitened). loss: `clip` with ratio bounds 1 - clip_low, 1 + clip_high and, when dual_clip
    > 0, the dual clip; or `cispo`, clipped weights. ratio: per token, or per sequence (GSPO).
    aggregation: mean over tokens, over sequences of token means, or token sums over `max_tokens`.
    kl_coef times the KL to the reference goes to the loss or the reward. is_cap > 0: truncated
    importance weights between sampler and trainer. drop_truncated: rows that ran out of budget are
    not trained on. epochs, minibatches: passes over a rollout and updates in each; microbatches: parts
    whose gradients are summed before an update.
    """

    advantage: str = "group"
    scale: str = "std"
    loss: str = "clip"
    ratio: str = "token"
    aggregation: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    kl_coef: float = 0.0
    kl_place: str = "loss"
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    gamma: float = 1.0
    lam: float = 1.0
    value_clip: float = 0.5
    is_cap: float = 0.0
    drop_truncated: bool = False
    epochs: int = 1
    minibatches: int = 1
    microbatches: int = 1

    def __post_init__(self):
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                raise UserError(
                    f"algorithm.{field}={getattr(self, field)!r}: must be one of {', '.join(allowed)}"
                )
        if self.kl_place == "loss" and self.kl_estimator == "k1" and self.kl_coef:
            raise UserError("algorithm.kl_estimator='k1' has no expected gradient in a loss; use k2 or k3")

    @property
    def on_policy(self) -> bool:
        """One update a rollout: old and new logprobs are the same numbers, computed once."""
        return self.epochs == 1 and self.minibatches == 1

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0


PRESETS = {
    # The paper's run: PPO, one sample a prompt, verl's defaults (paper section 5).
    "ppo_paper": AlgorithmConfig(advantage="gae", minibatches=16),
    "ppo": AlgorithmConfig(advantage="gae", lam=0.95, minibatches=4, kl_coef=0.01, kl_place="reward",
                           kl_estimator="k1"),
    "grpo": AlgorithmConfig(aggregation="sequence", kl_coef=0.01),
    "dr_grpo": AlgorithmConfig(scale="none", aggregation="constant"),
    "dapo": AlgorithmConfig(clip_high=0.28, drop_truncated=True),
    "gspo": AlgorithmConfig(ratio="sequence", aggregation="sequence", clip_low=3e-4, clip_high=4e-4),
    "rloo": AlgorithmConfig(scale="rloo"),
    "reinforce_pp": AlgorithmConfig(scale="batch"),
    "cispo": AlgorithmConfig(loss="cispo", clip_low=1.0, clip_high=2.0),
}  # fmt: skip


def resolve_algorithm(name: str) -> AlgorithmConfig:
    """A preset, or the `AlgorithmConfig` returned by `module:function`."""
    if name in PRESETS:
        return PRESETS[name]
    module, _, function = name.partition(":")
    if not function:
        raise UserError(f"config.rl.algorithm={name!r}: use one of {', '.join(PRESETS)}, or module:function")
    try:
        return getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise UserError(f"config.rl.algorithm={name!r}: {error}") from error
