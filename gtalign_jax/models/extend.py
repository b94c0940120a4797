"""A prefill that begins in the middle: prompts of which the first tokens' keys and values are known."""

import jax.numpy as jnp

from gtalign_jax.models.attention import Keys, visible
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.fused import attend
from gtalign_jax.models.layers import Block
from gtalign_jax.models.rope import rope_tables
from gtalign_jax.models.stack import split_layers, window_of
from gtalign_jax.models.transformer import Params, PromptCache, at_last, embed, final_norm, unembed
from gtalign_jax.types import Array, PyTree


def extend(
    params: Params, config: ModelConfig, tokens: Array, count: Array, known: PromptCache
) -> tuple[Array, PromptCache]:
    """(logits [P, V] of the token after each prompt, its cache), as `transformer.prefill` of the whole.

    tokens [P, W] int32, right-padded: what follows the known tokens, count [P] (at least 1) of them. known:
    in as many slots as the whole prompts need; what is in those after its length does not matter.
    """
    slots = jnp.arange(known.layers[0][0].shape[1], dtype=jnp.int32)
    at = known.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)  # [P, W]
    tables = rope_tables(config.rope, config.head_dim, at[:, None])
    row = jnp.arange(len(tokens))[:, None]
    x = embed(params, config, tokens)[:, None]
    written: list[PyTree] = []
    for i, layer in enumerate(split_layers(params)["layers"]):

        def attend_all(
            q: Array, k: Array, v: Array, old: tuple[Array, Array] = known.layers[i], i: int = i
        ) -> tuple[Array, PyTree]:
            both = zip(old, (k, v), strict=True)
            stored = tuple(x.at[row, at].set(new[:, 0], mode="drop") for x, new in both)
            mask = visible(at[:, None], slots, window_of(config, i))
            keys = Keys(stored[0][:, None], stored[1][:, None], mask)
            return attend(q, keys, kind=config.runtime.attention), stored

        x, stored = Block(config).apply({"params": layer}, x, tables, attend_all)
        written.append(stored)
    last = final_norm(params, config, at_last(x[:, 0], count))
    return unembed(params, config, last), PromptCache(tuple(written), known.length + count)
