"""Matrix products and the gated activation with their own gradients: less memory, and no strided copies.

Derived gradients keep every intermediate of the activation, and let a CPU's compiler write activations
transposed for the weights' gradient; both cost more than the arithmetic. The numbers are the same.
"""

import functools
import math

import jax
import jax.numpy as jnp

from gtalign_jax.types import Array, PyTree


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def project(x: Array, kernel: Array, bias: Array | None = None, inputs: int = 1) -> Array:
    """x [..., inputs...] @ kernel [inputs..., outputs...] + bias, the last `inputs` axes of x contracted."""
    y = jnp.tensordot(x, kernel, inputs)
    return y if bias is None else y + bias


def _project_forward(x: Array, kernel: Array, bias: Array | None, inputs: int) -> tuple[Array, tuple]:
    return project(x, kernel, bias, inputs), (x, kernel, bias is not None)


def _project_backward(inputs: int, saved: tuple, dy: Array) -> tuple[Array, Array, Array | None]:
    x, kernel, biased = saved
    x, dy = settled((x, dy))
    outputs, rows = kernel.ndim - inputs, x.ndim - inputs
    over_outputs = (tuple(range(rows, dy.ndim)), tuple(range(inputs, kernel.ndim)))
    over_rows = tuple(range(rows))
    dx = jnp.tensordot(dy, kernel, over_outputs)
    if math.prod(kernel.shape[:inputs]) <= math.prod(kernel.shape[inputs:]):
        d_kernel = jnp.tensordot(x, dy, (over_rows, over_rows))
    else:  # the narrower factor is the one that a product turns
        turned = settled(jnp.tensordot(dy, x, (over_rows, over_rows)))
        d_kernel = turned.transpose(*range(outputs, kernel.ndim), *range(outputs))
    return dx, d_kernel, _summed(dy, rows) if biased else None


project.defvjp(_project_forward, _project_backward)


def _summed(dy: Array, rows: int) -> Array:
    """dy summed over its first `rows` axes; a product on a CPU, where a sum would compute dy once more."""
    axes = tuple(range(rows))

    def product(dy: Array) -> Array:
        return jnp.tensordot(jnp.ones(dy.shape[:rows], dy.dtype), dy, (axes, axes))

    return jax.lax.platform_dependent(dy, cpu=product, default=lambda dy: dy.sum(axes))


@jax.custom_vjp
def gated(gate: Array, up: Array) -> Array:
    """silu(gate) * up, elementwise; only its two arguments are kept for the backward pass."""
    return jax.nn.silu(gate) * up


def _gated_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return gated(gate, up), (gate, up)


def _gated_backward(saved: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    """silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g); float32 inside."""
    saved = jax.lax.optimization_barrier(saved)  # or the forward pass would keep its sigmoid for this one
    gate, up, d = (x.astype(jnp.float32) for x in (*saved, d))
    s = jax.nn.sigmoid(gate)
    d_gate, d_up = d * up * s * (1 + gate * (1 - s)), d * gate * s
    return d_gate.astype(saved[0].dtype), d_up.astype(saved[1].dtype)


gated.defvjp(_gated_forward, _gated_backward)


def settled(arrays: PyTree) -> PyTree:
    """The same arrays, on a CPU written out in order before anything reads them."""
    return jax.lax.platform_dependent(arrays, cpu=jax.lax.optimization_barrier, default=lambda x: x)
