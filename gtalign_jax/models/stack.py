"""The layers of a model one after the other: scanned, or unrolled."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gtalign_jax.mesh.sharding import constrain
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.layers import BATCH, Block
from gtalign_jax.types import PyTree

Params = dict[str, Any]

# What `remat=dots` keeps of a layer: the products that its backward pass reads, which are dear to make again.
# By name, because no policy sees the products inside `products.project`.
KEPT = ("query", "key", "value", "gate", "up")


def split_layers(params: Params) -> Params:
    """The same parameters with `layers` as a tuple of per-layer trees."""
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params
    leaves, tree = jax.tree.flatten(layers)
    # Not x[i], whose gradient is as large as all layers, for every one of them.
    parts = ([part[0] for part in jnp.split(x, len(x))] for x in leaves)
    return {**params, "layers": tuple(tree.unflatten(layer) for layer in zip(*parts, strict=True))}


def window_of(config: ModelConfig, layer: int) -> int | None:
    """How many tokens back the attention of this layer reaches; None: to the first."""
    return config.window if config.window and config.window_layers[layer] else None


def run_layers(
    params: Params, config: ModelConfig, layer: Callable, x: Any, each: Sequence[PyTree] | None = None
) -> tuple[Any, Any]:
    """Apply `layer(block, x, window, last) -> (x, aux)` for every layer; aux comes back as a tuple of L.

    The layers are scanned when the config says so and they are stacked, else unrolled. A layer's window is a
    Python int when unrolled and a scanned array otherwise; only unrolled layers are told that they are last.
    each: of every layer something more, which `layer` is given as its last argument.
    """
    layers = params["layers"]
    stacked = not isinstance(layers, tuple)
    x = jax.tree.map(lambda y: constrain(y, *BATCH, "length", "width"), x)

    def step(x: PyTree, scanned: tuple, last: bool = False) -> tuple[PyTree, PyTree]:
        layer_params, window, *own = scanned
        return layer(functools.partial(Block(config).apply, {"params": layer_params}), x, window, last, *own)

    if stacked and config.runtime.scan_layers:
        windows = None
        if config.window:
            reach = [window_of(config, i) or config.max_positions for i in range(config.num_layers)]
            windows = jnp.array(reach, jnp.int32)
        own = () if each is None else (jax.tree.map(lambda *leaves: jnp.stack(leaves), *each),)
        x, aux = jax.lax.scan(_remat(config, step, scanned=True), x, (layers, windows, *own))
        return x, tuple(jax.tree.map(lambda a, i=i: a[i], aux) for i in range(config.num_layers))
    collected = []
    for i, layer_params in enumerate(split_layers(params)["layers"]):
        static = {"window": window_of(config, i), "last": i == config.num_layers - 1}
        one = functools.partial(lambda x, p, *own, window, last: step(x, (p, window, *own), last), **static)
        x, aux = _remat(config, one)(x, layer_params, *(() if each is None else (each[i],)))
        collected.append(aux)
    return x, tuple(collected)


def _remat(config: ModelConfig, step: Callable, scanned: bool = False) -> Callable:
    """A layer that makes again, in its backward pass, what `remat` does not keep."""
    remat = config.runtime.remat
    if remat == "none":
        return step
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT) if remat == "dots" else None
    # Beside its forward pass, and not in a loop of its own, the compiler would take what was made first.
    return jax.checkpoint(step, policy=policy, prevent_cse=not scanned)
