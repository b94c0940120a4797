"""From a scored rollout to what the update sees: advantages, old and reference log-probabilities.

Old log-probabilities are the trainer's own, at the sampling temperature; on-policy they are left to the
update, whose forward pass computes the same numbers. A row without a verdict keeps its place with an empty
mask and takes no part in any statistic; one cut short, when `drop_truncated` is set, is not trained on but
counts in its group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gtalign_jax.config import load_symbol
from gtalign_jax.errors import UserError
from gtalign_jax.learning.advantages import (
    decoupled_advantages,
    discounted_returns,
    gae,
    group_advantages,
    whiten,
)
from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.learning.logprobs import Limit, token_logprobs
from gtalign_jax.learning.losses import kl_estimate, soft_overlong_penalty, truncated_is_weight
from gtalign_jax.learning.packing import in_packed_rows
from gtalign_jax.models import lora
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.heads import token_values
from gtalign_jax.types import Array, Experience, Packing, PyTree, Reward, Rollout


@flax.struct.dataclass
class Scores:
    """What models say of a rollout before the update: old_logp, ref_logp and value [P, G, N], bootstrap
    [P, G], the value after the last token of rows cut short. None where nothing reads it."""

    old_logp: Array | None
    ref_logp: Array | None
    value: Array | None
    bootstrap: Array | None


# What an experience takes over from its rollout.
_KEPT = ("prompt", "prompt_length", "completion", "length", "sampler_logp")


def make_experience(
    rollout: Rollout,
    reward: Array,
    valid: Array,
    params: PyTree,
    reference: PyTree | None,
    critic: PyTree | None,
    model: ModelConfig,
    config: AlgorithmConfig,
    temperature: float,
    *,
    components: Array | None = None,
    kl_coef: Array | None = None,
    untrained: Array | None = None,
    base: PyTree | None = None,
    limit: Limit | None = None,
    old_from_sampler: bool = False,
    scores: Scores | None = None,
) -> Experience:
    """Experience of a rollout with reward [P, G] float32 and valid [P, G] bool.

    components [C, P, G]: the parts of the reward that gdpo normalises one by one (`reward_components`).
    kl_coef []: in place of the config's, when a controller moves it. untrained [P, G, N] bool: tokens
    without advantage, which the KL to the reference holds in place. base: what policy, reference and critic
    stand on when they are adapters (`models.lora`). limit: what all logprobs are under, when not all tokens
    were open to the sampler. old_from_sampler: it had other parameters than these, and old logprobs are its.
    scores: of the rollout, when they were computed before.
    """
    if scores is None:
        fixed = {"base": base, "limit": limit, "old_from_sampler": old_from_sampler}
        fixed["parts"] = config.minibatches * config.microbatches
        models = (params, reference, critic)
        scores = score_rollout(rollout, *models, model, config, temperature, **fixed)
    old_logp = rollout.sampler_logp if scores.old_logp is None else scores.old_logp
    known, mask = action_masks(rollout, valid, config)
    penalty = _kl_penalty(old_logp, scores.ref_logp, known, config, kl_coef)
    overlong = overlong_term(rollout.length, rollout.completion.shape[-1], config)
    terms = {"token_penalty": penalty, "overlong": overlong, "components": components}
    values = {"old_value": scores.value, "bootstrap": scores.bootstrap}
    advantage, returns = compute_advantages(config, reward, valid, known, mask, **terms, **values)
    if untrained is not None:
        advantage = jnp.where(untrained, 0.0, advantage)
    weight = truncated_is_weight(old_logp, rollout.sampler_logp, config.is_cap) if config.is_cap > 0 else None
    at = None if limit is None else limit.states(rollout)
    kept = {name: getattr(rollout, name) for name in _KEPT}
    learnt = {"action_mask": mask, "advantage": advantage, "returns": returns, "is_weight": weight}
    said = {"old_logp": old_logp, "ref_logp": scores.ref_logp, "old_value": scores.value, "limit": at}
    return Experience(**kept, **learnt, **said)


def action_masks(rollout: Rollout, valid: Array, config: AlgorithmConfig) -> tuple[Array, Array]:
    """([P, G, N] actions of rows with a verdict, those of them that are trained on)."""
    known = rollout.action_mask & valid[..., None]
    mask = known & rollout.finished[..., None] if config.drop_truncated else known
    return known, mask


def _kl_penalty(
    old_logp: Array, ref_logp: Array | None, known: Array, config: AlgorithmConfig, kl_coef: Array | None
) -> Array | None:
    """What the KL to the reference takes off each token's reward [P, G, N]; None where it is in the loss."""
    if ref_logp is None or config.kl_place != "reward":
        return None
    penalty = kl_estimate(old_logp, ref_logp, config.kl_estimator)
    return jnp.where(known, penalty * (config.kl_coef if kl_coef is None else kl_coef), 0.0)


def in_parts(function: Callable[..., Any], parts: int, *arrays: PyTree) -> Any:
    """function(*arrays) of arrays [P, ...] or trees of them, computed for P / parts prompts at a time.

    A part takes every `parts`-th prompt, so that each device computes rows that it holds.
    """
    if parts == 1 or arrays[0].shape[0] % parts:
        return function(*arrays)
    cut = lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
    join = lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
    return jax.tree.map(join, jax.lax.map(lambda xs: function(*xs), jax.tree.map(cut, arrays)))


def needs_scores(config: AlgorithmConfig, old_from_sampler: bool, *models: PyTree) -> bool:
    """Whether any of the models (policy, reference, critic) has something to say before the update."""
    _, reference, _ = models
    return bool(
        (_reads_old(config) and not old_from_sampler)
        or (config.needs_reference and reference is not None)
        or config.needs_critic
    )


def _reads_old(config: AlgorithmConfig) -> bool:
    """Whether anything but the update's own forward pass reads old logprobs."""
    return not config.on_policy or config.is_cap > 0 or config.kl_place == "reward"


def score_rollout(
    rollout: Rollout,
    params: PyTree,
    reference: PyTree | None,
    critic: PyTree | None,
    model: ModelConfig,
    config: AlgorithmConfig,
    temperature: float,
    *,
    base: PyTree | None = None,
    limit: Limit | None = None,
    old_from_sampler: bool = False,
    packing: Packing | None = None,
    parts: int = 1,
) -> Scores:
    """What the models say of a rollout; arguments as of `make_experience`.

    packing: rows to read instead of the padded ones. parts: how many calls of a model it is cut into.
    """
    at = None if limit is None else limit.states(rollout)
    args = (rollout.prompt, rollout.prompt_length, rollout.completion, rollout.length, at, packing)

    def logprobs(params: PyTree) -> Array:
        options = {"temperature": temperature, "limit": limit and limit.logits}

        def of(prompt, prompt_length, completion, length, at, packing):
            def score(completion, at, segments):
                more = {"at": at, "segments": segments, **options}
                return token_logprobs(params, model, prompt, prompt_length, completion, **more)[0]

            return in_packed_rows(score, packing, completion, length, at)

        return in_parts(of, parts, *args)

    old_logp = ref_logp = None
    if _reads_old(config) and not old_from_sampler:
        old_logp = logprobs(lora.join(base, params))
    if config.needs_reference and reference is not None:
        ref_logp = logprobs(lora.join(base, reference))
    critic = lora.join(lora.value_base(base), critic)
    value, bootstrap = _values(critic, rollout, model, config, packing, parts)
    return Scores(old_logp, ref_logp, value, bootstrap)


def compute_advantages(
    config: AlgorithmConfig,
    reward: Array,
    valid: Array,
    known: Array,
    mask: Array,
    *,
    token_penalty: Array | None = None,
    overlong: Array | None = None,
    old_value: Array | None = None,
    bootstrap: Array | None = None,
    components: Array | None = None,
) -> tuple[Array, Array | None]:
    """(advantage [P, G, N], returns [P, G, N] or None) of rewards [P, G] on the last known column.

    known [P, G, N]: actions of rows with a verdict; mask: those that are trained on. token_penalty
    [P, G, N] and overlong [P, G] are taken off the reward; old_value [P, G, N] and bootstrap [P, G] are
    the critic's. Everything is zero outside its mask.
    """
    if config.needs_components:
        return _decoupled(config, components, overlong, valid)[..., None] * mask, None
    reward = jnp.where(valid, reward.astype(jnp.promote_types(reward.dtype, jnp.float32)), 0.0)
    if overlong is not None:
        reward = reward - overlong
    token_reward = on_last_token(reward, known)
    if token_penalty is not None:
        token_reward = token_reward - token_penalty
    if config.advantage == "gae":
        advantage, returns = gae(token_reward, old_value, known, config.gamma, config.lam, bootstrap)
        return whiten(advantage, mask), returns
    if config.advantage == "returns":
        return whiten(discounted_returns(token_reward, known, config.gamma), mask), None
    total = reward if token_penalty is None else reward - jnp.sum(token_penalty, axis=-1)
    if ":" in config.scale:
        advantage = jnp.where(valid, load_symbol(config.scale, "config.algorithm.scale")(total, valid), 0.0)
    else:
        advantage = group_advantages(total, valid, config.scale, ddof=config.std_ddof, eps=config.std_eps)
    return advantage[..., None] * mask, None


def _decoupled(config: AlgorithmConfig, components: Array | None, overlong: Array | None, valid: Array):
    """GDPO's [P, G]; the length penalty is one more component."""
    if components is None:
        raise UserError("algorithm.scale='gdpo' needs the reward's components; this trainer passes none")
    weights = jnp.asarray(config.component_weights or (1.0,) * len(config.components), jnp.float32)
    if overlong is not None:
        components = jnp.concatenate([components, -overlong[None]])
        weights = jnp.append(weights, 1.0)
    return decoupled_advantages(components, weights, valid, ddof=config.std_ddof, eps=config.std_eps)


def reward_components(reward: Reward, names: Sequence[str]) -> Array:
    """[C, B] float32: `user`, `llm`, `welfare` or a named part of a reward, for `make_experience`.

    Raises UserError on a name the reward does not have.
    """
    known = {"user": reward.user, "llm": reward.llm, "welfare": reward.welfare, **reward.parts}
    for name in names:
        if name not in known:
            raise UserError(f"algorithm.components: no part {name!r}; this reward has {', '.join(known)}")
    return jnp.stack([jnp.asarray(known[name], jnp.float32) for name in names])


def overlong_term(length: Array, width: int, config: AlgorithmConfig) -> Array | None:
    """What long rows lose, [P, G] float32 in [0, overlong_penalty]; None when the penalty is off."""
    if not config.overlong_penalty:
        return None
    limit = config.max_tokens or width
    return -config.overlong_penalty * soft_overlong_penalty(length, limit, config.overlong_margin * limit)


def on_last_token(reward: Array, mask: Array) -> Array:
    """[P, G, N]: the reward [P, G] at each row's last masked column, zero elsewhere."""
    index = jnp.arange(mask.shape[-1])
    last = jnp.max(jnp.where(mask, index, -1), axis=-1, keepdims=True)
    return jnp.where(index == last, reward[..., None], 0.0)


def _values(
    critic: PyTree | None,
    rollout: Rollout,
    model: ModelConfig,
    config: AlgorithmConfig,
    packing: Packing | None,
    parts: int,
) -> tuple[Array | None, Array | None]:
    """(V before each token [P, G, N], V after the last token of truncated rows [P, G]), None if unused."""
    if not config.needs_critic:
        return None, None

    def of(prompt, prompt_length, completion, length, packing):
        score = lambda rows, _, segments: token_values(critic, model, prompt, prompt_length, rows, segments)
        return in_packed_rows(score, packing, completion, length)

    def values(completion, length):
        return in_parts(of, parts, rollout.prompt, rollout.prompt_length, completion, length, packing)

    if not config.bootstrap_truncated:
        return values(rollout.completion, rollout.length), None
    # One more column: the state after token N - 1 predicts a token that is not there.
    longer = jnp.pad(rollout.completion, ((0, 0), (0, 0), (0, 1)))
    value = values(longer, rollout.length + 1)
    after = jnp.take_along_axis(value, rollout.length[..., None], axis=-1)[..., 0]
    return value[..., :-1], jnp.where(rollout.finished, 0.0, after)
