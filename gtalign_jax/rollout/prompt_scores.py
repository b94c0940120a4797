"""What a model thought of a prompt: each token's log-probability after those before it, and the likeliest."""

import flax.struct
import jax
import jax.numpy as jnp

from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.transformer import forward, unembed
from gtalign_jax.types import Array, PyTree

CHUNK = 64  # positions whose logits exist at a time


class PromptScores(flax.struct.PyTreeNode):
    """Of tokens [S]: entry t is of token t + 1, given those up to t, and the last one is meaningless.

    logp [S] float32. likely [S, K] int32, the likeliest first, and likely_logp [S, K] float32.
    """

    logp: Array
    likely: Array
    likely_logp: Array


def prompt_scores(params: PyTree, config: ModelConfig, tokens: Array, top: int) -> PromptScores:
    """Scores of tokens [S], padding after them or not; what is told of padding is meaningless too."""
    length = jnp.full(1, len(tokens), jnp.int32)
    hidden = forward(params, config, tokens[None], length)[0]

    def read(at: tuple[Array, Array]) -> PromptScores:
        state, following = at
        logits = unembed(params, config, state)
        total = jax.nn.logsumexp(logits)
        largest, likely = jax.lax.top_k(logits, top)
        return PromptScores(logits[following] - total, likely, largest - total)

    return jax.lax.map(read, (hidden, jnp.roll(tokens, -1)), batch_size=CHUNK)
