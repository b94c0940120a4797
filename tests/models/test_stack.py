"""Stacked layers, taken apart."""

import jax
import jax.numpy as jnp
import numpy as np

from gtalign_jax.models.stack import split_layers


def loss(layers):
    split = split_layers({"layers": layers})["layers"]
    return sum((i + 1) * jnp.sum(layer["kernel"] ** 2) for i, layer in enumerate(split))


def test_layers_are_those_of_the_stack():
    kernel = np.arange(24.0).reshape(3, 2, 4)
    split = split_layers({"layers": {"kernel": kernel}, "final_norm": 1})
    np.testing.assert_array_equal([layer["kernel"] for layer in split["layers"]], kernel)
    assert split["final_norm"] == 1 and split_layers(split) is split


def test_their_gradient_is_joined_once():
    """An index has a gradient as large as the stack: one for each layer would grow as their square."""
    layers = {"kernel": jnp.arange(24.0).reshape(3, 2, 4)}
    weight = np.arange(1, 4).reshape(3, 1, 1)
    np.testing.assert_allclose(jax.grad(loss)(layers)["kernel"], 2 * weight * layers["kernel"])
    program = jax.jit(jax.grad(loss)).lower(layers).as_text()
    assert program.count("stablehlo.concatenate") == 1 and "stablehlo.pad" not in program
