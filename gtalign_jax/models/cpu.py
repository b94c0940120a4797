"""Decoding in the order a CPU likes: weights on the left, activations feature-major, keys transposed.

The same step as `transformer.decode_step`, for one device and dense weights:

    x [D, B] with B = P * G rows; every product is W [out, in] @ x [in, B], so that the small matrix is
    packed once and the large one is read along its rows; query, key and value are one product, gate and
    up another; keys are stored [K, H, slot] and values [K, slot, H], as their products read them.

On accelerators the compiler chooses layouts itself; `models.layouts` decides which step runs.
"""

import flax.struct
import jax
import jax.numpy as jnp

from gtalign_jax.models.attention import ring_visible, visible
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.rope import rope_tables
from gtalign_jax.models.transformer import Params, PromptCache, split_layers
from gtalign_jax.types import Array

_MASKED = -1e30  # as in `attention`


class FeatureWeights(flax.struct.PyTreeNode):
    """Weights of a model for the feature-major step, in the compute dtype.

    embedding, unembedding [V, D]; final_norm [D]; layers: per layer qkv [(Q + 2K) H, D], output [D, Q H],
    gate_up [2F, D], down [D, F], their biases `*_bias`, and the scales attention_norm, mlp_norm [D] and
    query_norm, key_norm [H] where the model has them.
    """

    embedding: Array
    unembedding: Array
    final_norm: Array
    layers: tuple[dict[str, Array], ...]


def feature_weights(params: Params, config: ModelConfig) -> FeatureWeights:
    """The weights of plain parameters, transposed and joined; done once for a generation."""
    dtype = config.runtime.compute_dtype
    layers = (jax.tree.map(lambda x: x.astype(dtype), layer) for layer in split_layers(params)["layers"])
    joined = tuple(map(_layer_weights, layers))
    return FeatureWeights(
        embedding=params["embedding"].astype(dtype),
        unembedding=params["embedding" if config.tie_embeddings else "unembedding"].astype(dtype),
        final_norm=params["final_norm"]["scale"].astype(dtype),
        layers=joined,
    )


def _layer_weights(layer: Params) -> dict[str, Array]:
    width = layer["attention_norm"]["scale"].shape[0]
    joined = {
        "qkv": [layer[name] for name in ("query", "key", "value")],
        "output": [layer["output"]],
        "gate_up": [layer["gate"], layer["up"]],
        "down": [layer["down"]],
    }
    found = {name: value["scale"] for name, value in layer.items() if "scale" in value}
    for name, parts in joined.items():
        inputs = (-1, width) if name in ("output", "down") else (width, -1)
        found[name] = jnp.concatenate([part["kernel"].reshape(inputs).T for part in parts])
        if "bias" in parts[0]:
            found[f"{name}_bias"] = jnp.concatenate([part["bias"].reshape(-1) for part in parts])
    return found


class RowCache(flax.struct.PyTreeNode):
    """Keys and values of the completions so far: per layer k [B, K, H, N] and v [B, K, N, H], B = P * G.

    One axis for the rows, because a reshape beside the update in place, such as of a G of one, makes XLA copy
    the whole cache in every step.
    """

    layers: tuple[tuple[Array, Array], ...]


def prompt_cache(cache: PromptCache) -> PromptCache:
    """A prefill's cache with k [P, K, H, S] and v [P, K, S, H] in place of [P, S, K, H]."""
    turned = tuple((k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)) for k, v in cache.layers)
    return PromptCache(turned, cache.length)


def init_decode_cache(config: ModelConfig, prompts: int, group: int, slots: int) -> RowCache:
    """An empty cache."""
    front, dtype = (prompts * group, config.num_kv_heads), config.runtime.compute_dtype
    keys, values = (*front, config.head_dim, slots), (*front, slots, config.head_dim)
    pairs = [(jnp.zeros(keys, dtype), jnp.zeros(values, dtype)) for _ in range(config.num_layers)]
    return RowCache(tuple(pairs))


def decode_step(
    weights: FeatureWeights,
    config: ModelConfig,
    token: Array,
    t: Array,
    prompt_cache: PromptCache,
    cache: RowCache,
    start: Array | None = None,
) -> tuple[Array, RowCache]:
    """`transformer.decode_step` on weights and caches of this module: same arguments, same numbers."""
    number = jnp.asarray(t)[None, None] if start is None else t - start  # [1, 1] or [P, G]
    position = prompt_cache.length[:, None] + number
    tables = rope_tables(config.rope, config.head_dim, position.reshape(-1))
    tables = tuple(_per_row(table, token.size // position.size) for table in tables)
    x = weights.embedding[token.reshape(-1)].T
    written = []
    for i, w in enumerate(weights.layers):
        q, k, v = _heads(w, config, _norm(x, w["attention_norm"], config), tables)
        window = config.window if config.window and config.window_layers[i] else None
        own = _write(cache.layers[i], k, v, t % cache.layers[i][0].shape[-1])
        written.append(own)
        out = _attend(q, own, prompt_cache.layers[i], prompt_cache.length, number, t, window)
        x = x + _product(w, "output", out)
        gate, up = jnp.split(_product(w, "gate_up", _norm(x, w["mlp_norm"], config)), 2)
        x = x + _product(w, "down", jax.nn.silu(gate) * up)
    hidden = _norm(x, weights.final_norm, config)
    logits = jnp.matmul(weights.unembedding, hidden, preferred_element_type=jnp.float32)
    # Without the barrier the transpose is moved into the product, which then copies the whole table.
    logits = jax.lax.optimization_barrier(logits).T
    return logits.reshape(*token.shape, -1), RowCache(tuple(written))


def _per_row(table: Array, group: int) -> Array:
    """A table [P, H/2] as [H/2, B]: its product with the 0/1 matrix that says whose prompt a row has.

    Exact, and unlike a repeat it is not fused into the rotations, which would compute the sines again for
    every head of every layer.
    """
    owner = jnp.repeat(jnp.eye(table.shape[0], dtype=table.dtype), group, axis=1)
    return jnp.matmul(table.T, owner, precision=jax.lax.Precision.HIGHEST)


def _product(w: dict[str, Array], name: str, x: Array) -> Array:
    y = w[name] @ x
    bias = w.get(f"{name}_bias")
    return y if bias is None else y + bias[:, None]


def _norm(x: Array, scale: Array, config: ModelConfig) -> Array:
    """RMS norm of x [..., features, B] over its features, computed in float32."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-2, keepdims=True) + config.rms_norm_eps)
    return wide.astype(x.dtype) * scale[:, None]


def _heads(w: dict[str, Array], c: ModelConfig, x: Array, tables: tuple[Array, Array]) -> tuple:
    """Rotated q [Q, H, B], rotated k and v [K, H, B] of normed activations x [D, B]."""
    y = _product(w, "qkv", x).reshape(-1, c.head_dim, x.shape[1])
    q, k, v = jnp.split(y, (c.num_heads, c.num_heads + c.num_kv_heads))
    if c.qk_norm:
        q, k = _norm(q, w["query_norm"], c), _norm(k, w["key_norm"], c)
    return _rotate(q, tables), _rotate(k, tables), v


def _rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """`rope.rotate` for x [heads, H, B] and tables [H/2, B]."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
    return turned.astype(x.dtype)


def _write(stored: tuple[Array, Array], k: Array, v: Array, t: Array) -> tuple[Array, Array]:
    """The cache of a layer by row with k, v [K, H, B] in slot t of every row."""
    write = jax.lax.dynamic_update_slice_in_dim
    k, v = (x.transpose(2, 0, 1) for x in (k, v))  # [B, K, H]
    return write(stored[0], k[..., None], t, axis=3), write(stored[1], v[..., None, :], t, axis=2)


def _attend(
    q: Array,
    own: tuple[Array, Array],
    shared: tuple[Array, Array],
    length: Array,
    number: Array,
    t: Array,
    window: int | None,
) -> Array:
    """Attention of q [Q, H, B] over prompt slots and the row's own up to slot t; returns [Q H, B].

    One softmax over both parts without joining them: exp(s - max) and the sums are those of the pair.
    """
    (rows, kv, dim, slots), p = own[0].shape, shared[0].shape[0]
    by_row = q.reshape(kv, -1, dim, rows).transpose(3, 0, 1, 2)  # [B, K, R, H]
    by_group = _by_group(by_row, p)
    prompt_slot = jnp.arange(shared[0].shape[-1])
    filled = (prompt_slot < length[:, None])[:, None]
    in_prompt = visible(length[:, None] + number, prompt_slot, window) & filled  # [P, G or 1, S]
    in_prompt = jnp.broadcast_to(
        in_prompt[:, None, :, None], (p, kv, rows // p, by_row.shape[2], len(prompt_slot))
    )
    in_own = ring_visible(number, t, slots, window)
    in_own = jnp.broadcast_to(in_own, (p, rows // p, slots)).reshape(rows, 1, 1, slots)
    old = _scores(by_group, shared[0], in_prompt.reshape(*by_group.shape[:3], -1))
    new = _scores(by_row, own[0], in_own)
    top = jnp.maximum(_by_row(old.max(-1, keepdims=True), by_row), new.max(-1, keepdims=True))
    old, new = jnp.exp(old - _by_group(top, p)), jnp.exp(new - top)
    total = _by_row(old.sum(-1, keepdims=True), by_row) + new.sum(-1, keepdims=True)
    out = _by_row(_matmul(old.astype(q.dtype), shared[1]), by_row) + _matmul(new.astype(q.dtype), own[1])
    return (out / total).astype(q.dtype).transpose(1, 2, 3, 0).reshape(-1, rows)


def _by_group(x: Array, prompts: int) -> Array:
    """x [B, K, R, ...] as [P, K, G R, ...], what a prompt's keys are multiplied with at once."""
    rows, kv, heads, last = x.shape
    return x.reshape(prompts, -1, kv, heads, last).swapaxes(1, 2).reshape(prompts, kv, -1, last)


def _by_row(x: Array, like: Array) -> Array:
    """x [P, K, G R, ...] as [B, K, R, ...] with the B, K and R of `like`."""
    rows, kv, heads = like.shape[:3]
    return x.reshape(len(x), kv, -1, heads, x.shape[-1]).swapaxes(1, 2).reshape(rows, kv, heads, -1)


def _scores(query: Array, keys: Array, mask: Array) -> Array:
    """Masked scores [..., S] of query [..., H] and keys [..., H, S]."""
    return jnp.where(mask, _matmul(query, keys) * query.shape[-1] ** -0.5, _MASKED)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
