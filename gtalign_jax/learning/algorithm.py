"""An algorithm is a choice of small functions: its settings, and the named presets.

docs/algorithms.md writes each preset out as equations.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gtalign_jax.config import check_call, load_symbol
from gtalign_jax.errors import INF, MAX_COUNT, UserError, in_range, within

_CHOICES = {
    "advantage": ("group", "gae", "returns"),
    "scale": ("std", "none", "rloo", "batch", "gdpo"),
    "loss": ("clip", "cispo"),
    "ratio": ("token", "sequence"),
    "aggregation": ("token", "sequence", "constant"),
    "kl_place": ("loss", "reward"),
    "kl_estimator": ("k1", "k2", "k3"),
}
_OPEN = ("scale", "loss")  # fields that also take module:function
_POSITIVE = ("epochs", "minibatches", "microbatches", "std_eps", "kl_horizon")
_FINITE = (
    *("std_eps", "kl_horizon", "clip_low", "clip_high", "dual_clip", "kl_coef", "kl_target", "kl_stop"),
    *("entropy_coef", "value_clip", "is_cap", "overlong_penalty"),
)
_COUNTS = (
    *("epochs", "minibatches", "microbatches", "max_tokens", "reference_every", "critic_warmup"),
    *("max_refills", "microbatch_tokens"),
)


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    """One policy update, composed. PPO and GRPO differ in `advantage` and nothing structural.

    advantage: `group` (samples of one prompt are each other's baseline, see `scale`), `gae` (critic,
    gamma, lam; whitened) or `returns` (discounted returns, whitened; no baseline but the batch mean).
    scale: of a group, see `advantages.group_advantages`; `gdpo` normalises the reward's `components`
    one by one and adds them with `component_weights` (none: all 1); or module:function of
    (reward, valid) [P, G]. std_ddof, std_eps: of the standard deviation.
    bootstrap_truncated: a row that ran out of budget goes on with the critic's value.
    loss: `clip` with ratio bounds 1 - clip_low, 1 + clip_high and, when dual_clip > 0, the dual clip;
    `cispo`, clipped weights; or module:function of (ratio, bounded, advantage, logp). ratio: per token,
    or per sequence (GSPO). aggregation: mean over tokens, over sequences of token means, or token sums
    over max_tokens. max_tokens: the budget of a completion (0: the width of the batch).
    kl_coef times the KL to the reference goes to the loss or the reward. kl_target > 0: the coefficient
    follows the measured KL, nats per token, over kl_horizon samples. kl_stop > 0: the rest of a rollout's
    updates is dropped once the KL to its old policy exceeds it. reference_every > 0: the reference
    becomes the policy every so many steps.
    is_cap > 0: truncated importance weights between sampler and trainer. drop_truncated: rows that ran
    out of budget count in the group's statistics but are not trained on. overlong_penalty times a ramp
    over the last overlong_margin (share of the budget) is taken off the reward of long rows.
    fluency_floor < 0: a response that the reference finds less likely, in nats per token on average, earns
    nothing (0: no floor).
    dynamic_sampling: groups with equal rewards are drawn again, at most max_refills batches.
    epochs, minibatches: passes over a rollout and updates in each; microbatches: parts whose gradients
    are summed before an update, in a config also `auto`. microbatch_tokens > 0: parts of at most so many
    token slots instead, over all devices, without the padding of shorter completions
    (`learning.microbatches`). critic_warmup: first steps that train the critic alone.
    """

    advantage: str = "group"
    scale: str = "std"
    std_ddof: int = 1
    std_eps: float = 1e-4
    components: tuple[str, ...] = ("user", "llm")
    component_weights: tuple[float, ...] = ()
    loss: str = "clip"
    ratio: str = "token"
    aggregation: str = "token"
    max_tokens: int = 0
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    kl_coef: float = 0.0
    kl_place: str = "loss"
    kl_estimator: str = "k3"
    kl_target: float = 0.0
    kl_horizon: float = 10_000.0
    kl_stop: float = 0.0
    reference_every: int = 0
    entropy_coef: float = 0.0
    gamma: float = 1.0
    lam: float = 1.0
    bootstrap_truncated: bool = False
    value_clip: float = 0.5
    critic_warmup: int = 0
    is_cap: float = 0.0
    drop_truncated: bool = False
    overlong_margin: float = 0.2
    overlong_penalty: float = 0.0
    fluency_floor: float = 0.0
    dynamic_sampling: bool = False
    max_refills: int = 3
    epochs: int = 1
    minibatches: int = 1
    microbatches: int = 1
    microbatch_tokens: int = 0

    def __post_init__(self) -> None:
        for field, allowed in _CHOICES.items():
            value = getattr(self, field)
            if value not in allowed and not (field in _OPEN and ":" in value):
                more = " or module:function" if field in _OPEN else ""
                raise ValueError(f"{field}={value!r}: must be one of {', '.join(allowed)}{more}")
        self._check_ranges()
        for field in _POSITIVE:
            if getattr(self, field) <= 0:
                raise ValueError(f"{field}={getattr(self, field)}: must be positive")
        if self.microbatch_tokens < 0 or (self.microbatch_tokens and self.microbatches > 1):
            raise ValueError(
                f"microbatch_tokens={self.microbatch_tokens}: must be 0, or positive with "
                "microbatches=1, which it replaces"
            )
        self._check_kl()
        if self.std_ddof not in (0, 1):
            raise ValueError(f"std_ddof={self.std_ddof}: must be 0 (population) or 1 (sample)")
        if self.dual_clip and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"dual_clip={self.dual_clip}: must exceed 1 + clip_high (0: off)")
        if not 0 < self.overlong_margin <= 1:
            raise ValueError(f"overlong_margin={self.overlong_margin}: must be a share in (0, 1]")
        if self.component_weights and len(self.component_weights) != len(self.components):
            raise ValueError("component_weights: give one for each of components, or none")

    def _check_ranges(self) -> None:
        within(self, 0, INF, *_FINITE)
        within(self, 0, MAX_COUNT, *_COUNTS)
        in_range(self, gamma=(0, 1), lam=(0, 1), component_weights=(-INF, INF), fluency_floor=(-INF, 0))

    def _check_kl(self) -> None:
        if self.kl_place == "loss" and self.kl_estimator == "k1" and self.kl_coef:
            raise ValueError("kl_estimator='k1' has no expected gradient in a loss; use k2 or k3")
        if self.scale == "gdpo" and self.kl_coef and self.kl_place == "reward":
            raise ValueError("kl_place='reward' is no reward component of gdpo; use kl_place='loss'")
        for field in ("kl_target", "reference_every"):
            if getattr(self, field) and not self.kl_coef:
                raise ValueError(f"{field} needs a KL term; set kl_coef > 0")

    @property
    def on_policy(self) -> bool:
        """One update a rollout: old and new logprobs are the same numbers, computed once."""
        return self.epochs == 1 and self.minibatches == 1

    @property
    def by_token(self) -> bool:
        """A token's part of the loss depends on that token alone; of a loss from elsewhere nobody knows."""
        return self.ratio == "token" and self.loss in _CHOICES["loss"]

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or self.fluency_floor < 0

    @property
    def needs_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def needs_components(self) -> bool:
        return self.advantage == "group" and self.scale == "gdpo"


PRESETS = {
    # The paper's run: PPO, one sample a prompt, verl's defaults, its dual clip among them (section 5).
    "ppo_paper": AlgorithmConfig(advantage="gae", minibatches=16, dual_clip=3.0),
    "ppo": AlgorithmConfig(
        advantage="gae", lam=0.95, minibatches=4, kl_coef=0.01, kl_place="reward", kl_estimator="k1"
    ),
    "grpo": AlgorithmConfig(aggregation="sequence", kl_coef=0.01),
    "dr_grpo": AlgorithmConfig(scale="none", aggregation="constant"),
    # DAPO's penalty is half the range of its rewards; welfare lies in [0, 1].
    "dapo": AlgorithmConfig(clip_high=0.28, dynamic_sampling=True, overlong_penalty=0.5),
    "gspo": AlgorithmConfig(ratio="sequence", aggregation="sequence", clip_low=3e-4, clip_high=4e-4),
    # The whole completion is one action: token terms are summed, never averaged over its length.
    "rloo": AlgorithmConfig(scale="rloo", aggregation="constant"),
    "gdpo": AlgorithmConfig(scale="gdpo"),
    "reinforce_pp": AlgorithmConfig(advantage="returns", kl_coef=0.01, kl_place="reward", kl_estimator="k1"),
    "reinforce_pp_baseline": AlgorithmConfig(scale="batch", kl_coef=0.01, kl_estimator="k2"),
    "cispo": AlgorithmConfig(loss="cispo", clip_low=1.0, clip_high=4.0),
}


def resolve_algorithm(name: str) -> AlgorithmConfig:
    """A preset, or the `AlgorithmConfig` returned by `module:function`. UserError when neither."""
    if name in PRESETS:
        return PRESETS[name]
    if ":" not in name:
        known = ", ".join(PRESETS)
        raise UserError(f"config.align.algorithm={name!r}: use one of {known}, or module:function")
    make = load_symbol(name, "config.align.algorithm")
    config = check_call(f"config.align.algorithm={name!r}", make)
    if not isinstance(config, AlgorithmConfig):
        kind = type(config).__name__
        raise UserError(f"config.align.algorithm={name!r}: must return an AlgorithmConfig, not {kind}")
    return config


def check_functions(config: AlgorithmConfig) -> None:
    """UserError for a `scale` or `loss` of the user's own that does not take, or give, arrays as ours do."""
    number = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    given = {"scale": (number, jax.ShapeDtypeStruct((2, 2), bool)), "loss": (number,) * 4}
    for field, arguments in given.items():
        name = getattr(config, field)
        if ":" in name:
            where = f"config.algorithm.{field}={name!r}"
            function = load_symbol(name, where)
            found = check_call(where, functools.partial(jax.eval_shape, function, *arguments))
            if getattr(found, "shape", None) != number.shape:
                raise UserError(f"{where}: must return one number for each it is given")
