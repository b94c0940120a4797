"""A prefill that begins in the middle: prompts of which the first tokens' keys and values are known."""

from collections.abc import Callable

import jax.numpy as jnp

from gtalign_jax.models.attention import Keys, visible
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.fused import attend
from gtalign_jax.models.rope import rope_tables
from gtalign_jax.models.stack import run_layers
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

    def layer(
        block: Callable, x: Array, window: Array | None, last: bool, old: tuple[Array, Array]
    ) -> tuple[Array, PyTree]:
        del last  # the keys of every token are asked for

        def attend_all(q: Array, k: Array, v: Array) -> tuple[Array, PyTree]:
            stored_k, stored_v = (
                held.at[row, at].set(new[:, 0], mode="drop") for held, new in zip(old, (k, v), strict=True)
            )
            keys = Keys(stored_k[:, None], stored_v[:, None], visible(at[:, None], slots, window))
            return attend(q, keys, kind=config.runtime.attention), (stored_k, stored_v)

        return block(x, tables, attend_all)

    x, written = run_layers(params, config, layer, embed(params, config, tokens)[:, None], known.layers)
    last = final_norm(params, config, at_last(x[:, 0], count))
    return unembed(params, config, last), PromptCache(written, known.length + count)
