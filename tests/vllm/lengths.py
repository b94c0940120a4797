"""A reward that tells samples of a random model apart, which all break the protocol."""

import jax.numpy as jnp

from gtalign_jax.rewards.mutual_welfare import welfare_parts
from gtalign_jax.types import Features, Reward


def brief(features: Features, config) -> Reward:
    user, llm, parts = welfare_parts(features, config)
    return Reward(user=user, llm=llm, welfare=jnp.exp(-features.total_words / 30), parts=parts)
