"""From a scored rollout to what the update sees: advantages, old and reference log-probabilities.

Old log-probabilities are the trainer's own, at the sampling temperature; on-policy they are left to the
update, whose forward pass computes the same numbers. A row without a verdict keeps its place with an empty
mask and takes no part in any statistic; one cut short, when `drop_truncated` is set, is not trained on but
counts in its group.
"""

from collections.abc import Sequence
from typing import NamedTuple

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
from gtalign_jax.learning.losses import kl_estimate, soft_overlong_penalty, truncated_is_weight
from gtalign_jax.learning.scores import Scores, score_rollout
from gtalign_jax.learning.spec import Spec
from gtalign_jax.types import Array, Batch, Completions, Experience, Models, Ratio, Reward


class Masks(NamedTuple):
    """known [P, G, N] bool: actions of rows with a verdict; trained: those of them that are trained on."""

    known: Array
    trained: Array


class Penalties(NamedTuple):
    """What is taken off the reward, or None: token [P, G, N], the KL to the reference; overlong [P, G]."""

    token: Array | None = None
    overlong: Array | None = None


def make_experience(
    spec: Spec,
    models: Models,
    batch: Batch,
    kl_coef: Array | None = None,
    scores: Scores | None = None,
) -> Experience:
    """Experience of a batch.

    kl_coef []: in place of the config's, when a controller moves it. scores: of the rollout, when they were
    computed before.
    """
    config, rollout = spec.algorithm, batch.rollout
    if scores is None:
        scores = score_rollout(spec, models, rollout, parts=config.minibatches * config.microbatches)
    written = rollout.completions
    old_logp = written.logp if scores.old_logp is None else scores.old_logp
    masks = action_masks(written, batch.valid, config)
    fluency = response_fluency(scores.ref_logp, batch.response, masks.known)
    if fluency is not None and config.fluency_floor < 0:
        batch = above_floor(batch, fluency, config.fluency_floor)
    penalties = Penalties(
        token=_kl_penalty(old_logp, scores.ref_logp, masks.known, config, kl_coef),
        overlong=overlong_term(written.length, written.tokens.shape[-1], config),
    )
    advantage, returns = compute_advantages(config, batch, masks, penalties, scores)
    if batch.untrained is not None:
        advantage = jnp.where(batch.untrained, 0.0, advantage)
    return Experience(
        prompts=rollout.prompts,
        completions=written.replace(action_mask=masks.trained),
        old_logp=old_logp,
        advantage=advantage,
        ref_logp=scores.ref_logp,
        returns=returns,
        old_value=scores.value,
        is_weight=truncated_is_weight(old_logp, written.logp, config.is_cap) if config.is_cap > 0 else None,
        limit=None if spec.limit is None else spec.limit.states(written),
        fluency=fluency,
    )


def action_masks(completions: Completions, valid: Array, config: AlgorithmConfig) -> Masks:
    """The masks of rows whose reward is known where valid [P, G] bool."""
    known = completions.action_mask & valid[..., None]
    return Masks(known, known & completions.finished[..., None] if config.drop_truncated else known)


def response_fluency(ref_logp: Array | None, response: Array | None, known: Array) -> Ratio | None:
    """(log-probability [P, G] of each response under the reference, its tokens); None without a reference.

    response: as in `Batch`. known [P, G, N]: from `action_masks`. ref_logp: at the sampling temperature.
    """
    if ref_logp is None:
        return None
    tokens = known if response is None else known & response
    total = jnp.sum(jnp.where(tokens, ref_logp, 0.0), axis=-1)
    return Ratio(total, jnp.sum(tokens, axis=-1).astype(jnp.float32))


def above_floor(batch: Batch, fluency: Ratio, floor: float) -> Batch:
    """The batch in which a response whose mean log-probability is under the floor earns nothing."""
    poor = fluency.total < floor * fluency.count
    components = None if batch.components is None else jnp.where(poor, 0.0, batch.components)
    return batch.replace(reward=jnp.where(poor, 0.0, batch.reward), components=components)


def _kl_penalty(
    old_logp: Array, ref_logp: Array | None, known: Array, config: AlgorithmConfig, kl_coef: Array | None
) -> Array | None:
    """What the KL to the reference takes off each token's reward [P, G, N]; None where it is in the loss."""
    if ref_logp is None or config.kl_place != "reward":
        return None
    penalty = kl_estimate(old_logp, ref_logp, config.kl_estimator)
    return jnp.where(known, penalty * (config.kl_coef if kl_coef is None else kl_coef), 0.0)


def compute_advantages(
    config: AlgorithmConfig, batch: Batch, masks: Masks, penalties: Penalties, scores: Scores
) -> tuple[Array, Array | None]:
    """(advantage [P, G, N], returns [P, G, N] or None) of rewards [P, G] on the last known column.

    Of the batch, reward, valid and components are read; of the scores, value and bootstrap. Everything is
    zero outside its mask.
    """
    valid, (known, mask) = batch.valid, masks
    if config.needs_components:
        return _decoupled(config, batch.components, penalties.overlong, valid)[..., None] * mask, None
    reward = jnp.where(valid, batch.reward.astype(jnp.promote_types(batch.reward.dtype, jnp.float32)), 0.0)
    if penalties.overlong is not None:
        reward = reward - penalties.overlong
    token_reward = on_last_token(reward, known)
    if penalties.token is not None:
        token_reward = token_reward - penalties.token
    if config.advantage == "gae":
        advantage, returns = gae(
            token_reward, scores.value, known, config.gamma, config.lam, scores.bootstrap
        )
        return whiten(advantage, mask), returns
    if config.advantage == "returns":
        return whiten(discounted_returns(token_reward, known, config.gamma), mask), None
    total = reward if penalties.token is None else reward - jnp.sum(penalties.token, axis=-1)
    if ":" in config.scale:
        advantage = jnp.where(valid, load_symbol(config.scale, "config.algorithm.scale")(total, valid), 0.0)
    else:
        advantage = group_advantages(total, valid, config.scale, ddof=config.std_ddof, eps=config.std_eps)
    return advantage[..., None] * mask, None


def _decoupled(
    config: AlgorithmConfig, components: Array | None, overlong: Array | None, valid: Array
) -> Array:
    """GDPO's [P, G]; the length penalty is one more component."""
    if components is None:
        raise UserError("algorithm.scale='gdpo' needs the reward's components; this batch has none")
    weights = jnp.asarray(config.component_weights or (1.0,) * len(config.components), jnp.float32)
    if overlong is not None:
        components = jnp.concatenate([components, -overlong[None]])
        weights = jnp.append(weights, 1.0)
    return decoupled_advantages(components, weights, valid, ddof=config.std_ddof, eps=config.std_eps)


def reward_components(reward: Reward, names: Sequence[str]) -> Array:
    """[C, B] float32: `user`, `llm`, `welfare` or a named part of a reward, for `Batch.components`.

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
