"""A decoder as pure functions of (params, config, tokens).

Four ways through the same layers, which differ only in what a token attends to:

    forward         rows [B, T]; each token sees its row's past.
    forward_shared  prompts [P, S] once, completions [P, G, N]; a completion sees its prompt and itself.
    prefill         prompts [P, S]; keeps every layer's keys and values.
    decode_step     one token per sample; sees its prompt's cache and its own.

Parameters are a plain dict; `params["layers"]` is stacked on a leading L axis, or a tuple of L dicts
after `split_layers` (what decoding uses, so that no weight is sliced inside the loop).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from gtalign_jax.mesh.sharding import constrain
from gtalign_jax.models.attention import Keys, ring_visible, visible
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.fused import attend
from gtalign_jax.models.layers import BATCH, Block, RMSNorm
from gtalign_jax.models.rope import rope_tables
from gtalign_jax.models.stack import run_layers, split_layers, window_of
from gtalign_jax.types import Array, PyTree

Params = dict[str, Any]


class PromptCache(flax.struct.PyTreeNode):
    """Keys and values of the prompts: per layer k, v [P, S, K, H]; length [P] int32."""

    layers: tuple[tuple[Array, Array], ...]
    length: Array


class DecodeCache(flax.struct.PyTreeNode):
    """Keys and values of the completions so far: per layer k, v [P, G, N, K, H]."""

    layers: tuple[tuple[Array, Array], ...]


class Segments(NamedTuple):
    """Several completions of one prompt in one row: ids [P, G, N], equal where tokens are of one completion;
    positions [P, G, N] int32, counted from 0 in each."""

    ids: Array
    positions: Array


def init_params(key: Array, config: ModelConfig) -> Params:
    """Random parameters (normal with `initializer_range`) in `param_dtype`."""
    return nn.meta.unbox(_boxed_params(key, config))


def logical_axes(config: ModelConfig) -> Params:
    """A tree like the parameters whose leaves are tuples of logical axis names."""
    boxed = jax.eval_shape(functools.partial(_boxed_params, config=config), jax.random.key(0))
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=_is_box)


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.meta.AxisMetadata)


def _boxed_params(key: Array, config: ModelConfig) -> Params:
    dtype = jnp.dtype(config.runtime.param_dtype)
    embed_key, head_key, norm_key, layer_key = jax.random.split(key, 4)
    table_init = nn.with_logical_partitioning(
        nn.initializers.normal(config.initializer_range), ("vocab", "embed")
    )
    shape = (config.vocab_size, config.hidden_size)
    x = jnp.zeros((1, 1, 1, config.hidden_size), config.runtime.compute_dtype)
    tables = rope_tables(config.rope, config.head_dim, jnp.zeros((1, 1, 1), jnp.int32))

    def init_layer(k: Array) -> Params:
        return Block(config).init(k, x, tables, lambda q, k, v: (q, None))["params"]

    layers = jax.vmap(init_layer)(jax.random.split(layer_key, config.num_layers))
    params = {
        "embedding": table_init(embed_key, shape, dtype),
        "layers": _name_leading_axis(layers, "layers"),
        "final_norm": RMSNorm(config).init(norm_key, x)["params"],
    }
    if not config.tie_embeddings:
        params["unembedding"] = table_init(head_key, shape, dtype)
    return params


def _name_leading_axis(boxed: Params, name: str) -> Params:
    return jax.tree.map(lambda box: box.replace(names=(name, *box.names)), boxed, is_leaf=_is_box)


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    length: Array,
    *,
    segment_ids: Array | None = None,
    positions: Array | None = None,
) -> Array:
    """Hidden states [B, T, D] of right-padded rows tokens [B, T], length [B].

    segment_ids [B, T] keep packed sequences apart; positions [B, T] then restart in each. Padding
    attends to itself and earlier tokens; its output is meaningless and finite.
    """
    del length  # right padding comes after every real token, so causality alone hides it
    batch, time = tokens.shape
    index = jnp.arange(time, dtype=jnp.int32)
    positions = jnp.broadcast_to(index, tokens.shape) if positions is None else positions
    same = True
    if segment_ids is not None:
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]

    def layer(block: Callable, x: Array, window: Array | None, last: bool) -> tuple[Array, None]:
        del last  # every state is asked for

        def self_attention(q: Array, k: Array, v: Array) -> tuple[Array, PyTree]:
            keys = Keys(
                k, v, visible(index, index, window)[None, None] & same, causal=window is None and same is True
            )
            return attend(q, keys, kind=config.runtime.attention), None

        return block(x, tables, self_attention)

    tables = rope_tables(config.rope, config.head_dim, positions[:, None])
    x, _ = run_layers(params, config, layer, embed(params, config, tokens)[:, None])
    return final_norm(params, config, x)[:, 0]


def forward_shared(
    params: Params,
    config: ModelConfig,
    prompt: Array,
    prompt_length: Array,
    completion: Array,
    segments: Segments | None = None,
) -> Array:
    """Hidden states [P, G, N, D] that predict completion [P, G, N] after prompt [P, S].

    State n predicts token n: state 0 is the prompt's last token's, so the last completion token is
    never fed. The prompt is computed once per group, forward and backward. segments: rows that hold
    several completions of the prompt, which do not see each other.
    """
    group = completion.shape[1]
    steps = jnp.arange(completion.shape[2], dtype=jnp.int32) if segments is None else segments.positions

    def layer(block: Callable, x: tuple[Array, Array], window: Array | None, last: bool) -> tuple:
        x_prompt, x_own = x
        x_prompt, keys = _prompt_layer(block, x_prompt, prompt_length, config, window, last)
        kind = config.runtime.attention
        attend_both = _attention_on_both(keys, prompt_length, steps, window, kind, segments)
        x_own, _ = block(x_own, own_tables, attend_both)
        return (x_prompt, x_own), None

    own_tables = rope_tables(config.rope, config.head_dim, prompt_length[:, None, None] + steps)
    x = (embed(params, config, prompt)[:, None], embed(params, config, completion))
    (x_prompt, x_own), _ = run_layers(params, config, layer, x)
    last = at_last(x_prompt[:, 0], prompt_length)[:, None, None]
    first = jnp.broadcast_to(last, (last.shape[0], group, 1, last.shape[-1]))
    before = jnp.concatenate([first, x_own[:, :, :-1]], axis=2)
    if segments is not None:
        before = jnp.where(steps[..., None] == 0, last, before)
    return final_norm(params, config, before)


def _prompt_layer(
    block: Callable, x: Array, length: Array, config: ModelConfig, window: Array | None, last: bool
) -> tuple[Array, tuple[Array, Array]]:
    """A layer of prompts x [P, 1, S, D]: what it makes of x, and its keys and values [P, S, K, H].

    last: nothing after it reads more than the state of each prompt's last token, [P, 1, 1, D].
    """
    pos = jnp.arange(x.shape[2], dtype=jnp.int32)
    tables = rope_tables(config.rope, config.head_dim, pos[None, None])

    def self_attention(q: Array, k: Array, v: Array) -> tuple[Array, PyTree]:
        keys = Keys(k, v, visible(pos, pos, window)[None, None], causal=window is None)
        return attend(q, keys, kind=config.runtime.attention), (k[:, 0], v[:, 0])

    if not last:
        return block(x, tables, self_attention)
    _, (k, v) = block(x, tables, lambda q, k, v: (q, (k, v)))  # all but the keys is never computed
    end = (length - 1)[:, None, None]
    seen = Keys(k, v, visible(end, pos, window))

    def attend_end(q: Array, _k: Array, _v: Array) -> tuple[Array, tuple[Array, Array]]:
        return attend(q, seen, kind=config.runtime.attention), (k[:, 0], v[:, 0])

    tables = rope_tables(config.rope, config.head_dim, end)
    return block(at_last(x[:, 0], length)[:, None, None], tables, attend_end)


def _attention_on_both(
    keys: tuple[Array, Array],
    prompt_length: Array,
    steps: Array,
    window: Array | None,
    kind: str,
    segments: Segments | None,
) -> Callable:
    """The attention of completions on their prompt's keys [P, S, K, H] and on themselves.

    steps [..., N]: positions of the completions' tokens after the prompt.
    """
    plain = window is None  # then kernels may go by causality and length instead of the masks
    prompt_pos = jnp.arange(keys[0].shape[1], dtype=jnp.int32)
    own_pos = prompt_length[:, None, None] + steps
    filled = (prompt_pos < prompt_length[:, None])[:, None, None, :]
    shared_mask = visible(own_pos, prompt_pos, window) & filled
    own_mask = visible(own_pos, own_pos, window)
    if segments is not None:
        own_mask &= segments.ids[..., :, None] == segments.ids[..., None, :]
    shared = Keys(*keys, shared_mask, length=prompt_length if plain else None)

    def attend_both(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        own = Keys(k, v, own_mask, causal=plain and segments is None)
        return attend(q, own, shared, kind=kind), None

    return attend_both


def prefill(
    params: Params, config: ModelConfig, prompt: Array, prompt_length: Array
) -> tuple[Array, PromptCache]:
    """(logits [P, V] of the token after each prompt, its cache) for right-padded prompt [P, S]."""

    def layer(block: Callable, x: Array, window: Array | None, last: bool) -> tuple[Array, PyTree]:
        return _prompt_layer(block, x, prompt_length, config, window, last)

    x, keys = run_layers(params, config, layer, embed(params, config, prompt)[:, None])
    last = final_norm(params, config, at_last(x[:, 0], prompt_length))
    return unembed(params, config, last), PromptCache(keys, prompt_length)


def init_decode_cache(config: ModelConfig, prompts: int, group: int, slots: int) -> DecodeCache:
    """An empty cache for `slots` completion tokens of `group` samples of each prompt."""
    shape = (prompts, group, slots, config.num_kv_heads, config.head_dim)
    axes = (*BATCH, "keys", "kv", "head_dim")

    def empty() -> Array:
        return constrain(jnp.zeros(shape, config.runtime.compute_dtype), *axes)

    return DecodeCache(tuple((empty(), empty()) for _ in range(config.num_layers)))


def decode_step(
    params: Params,
    config: ModelConfig,
    token: Array,
    t: Array,
    prompt_cache: PromptCache,
    cache: DecodeCache,
    start: Array | None = None,
) -> tuple[Array, DecodeCache]:
    """Feed completion token t [P, G]; returns (logits [P, G, V] of token t + 1, the cache with it).

    t [] int32 is the write index, the same for all rows; the token's position is prompt length + t.
    Cache slots after t are ignored, so rewinding t and writing again is allowed. start [P, G] int32: the t of
    each row's first token where rows began at different times. The token is then a row's number t - start,
    and the cache a ring: slot t % N is written, and a row sees none that is older than its first token.
    """
    slots = cache.layers[0][0].shape[2]
    number = jnp.asarray(t)[None, None] if start is None else t - start  # [1, 1] or [P, G]
    position = prompt_cache.length[:, None, None] + number[..., None]
    tables = rope_tables(config.rope, config.head_dim, position)
    x = embed(params, config, token)[:, :, None]
    written: list[PyTree] = []
    for i, layer in enumerate(split_layers(params)["layers"]):
        window = window_of(config, i)
        prompt_k, prompt_v = prompt_cache.layers[i]
        prompt_pos = jnp.arange(prompt_k.shape[1], dtype=jnp.int32)
        filled = (prompt_pos < prompt_cache.length[:, None])[:, None, None, :]
        shared = Keys(prompt_k, prompt_v, visible(position, prompt_pos, window) & filled)

        def attend_cached(
            q: Array,
            k: Array,
            v: Array,
            i: int = i,
            window: Array | None = window,
            shared: Keys = shared,
        ) -> tuple[Array, PyTree]:
            stored_k, stored_v = (
                jax.lax.dynamic_update_slice_in_dim(old, new, t % slots, axis=2)
                for old, new in zip(cache.layers[i], (k, v), strict=True)
            )
            own = Keys(stored_k, stored_v, ring_visible(number[..., None], t, slots, window))
            return attend(q, own, shared, kind=config.runtime.attention), (stored_k, stored_v)

        x, stored = Block(config).apply({"params": layer}, x, tables, attend_cached)
        written.append(stored)
    hidden = final_norm(params, config, x[:, :, 0])
    return unembed(params, config, hidden), DecodeCache(tuple(written))


def embed(params: Params, config: ModelConfig, tokens: Array) -> Array:
    """Token embeddings [..., D] in the compute dtype."""
    return params["embedding"][tokens].astype(config.runtime.compute_dtype)


def unembed(params: Params, config: ModelConfig, hidden: Array) -> Array:
    """Logits [..., V] float32 of hidden states [..., D]."""
    table = params["embedding" if config.tie_embeddings else "unembedding"]
    table = table.astype(config.runtime.compute_dtype)
    logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
    return constrain(logits, *[None] * (logits.ndim - 1), "vocab")


def final_norm(params: Params, config: ModelConfig, x: Array) -> Array:
    """Hidden states [..., D] as `unembed` reads them."""
    return RMSNorm(config).apply({"params": params["final_norm"]}, x)


def at_last(x: Array, length: Array) -> Array:
    """Row i of x [P, S, D] at slot length[i] - 1; of [P, 1, D], which is that slot already, itself."""
    if x.shape[1] == 1:
        return x[:, 0]
    return jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)[:, 0]
