"""Gradients of a loss given as sum and count, over micro-batches, and the step they lead to."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gtalign_jax.errors import UserError
from gtalign_jax.learning.state import Optimizer, Streamed
from gtalign_jax.types import Array, ModelState, PyTree, Ratio

Metrics = dict[str, Ratio]
LossFn = Callable[[PyTree, PyTree], tuple[Ratio, Metrics]]


class Sums(NamedTuple):
    """What parts of a batch add up to: the gradient of the loss's total, its count [], all metrics."""

    grads: PyTree
    count: Array
    metrics: Metrics


def part_sums(loss: LossFn, params: PyTree, part: PyTree) -> Sums:
    """The sums of one part of a batch."""

    def total(params: PyTree) -> tuple[Array, Any]:
        ratio, metrics = loss(params, part)
        return ratio.total, (ratio.count, metrics)

    (_, (count, metrics)), grads = jax.value_and_grad(total, has_aux=True)(params)
    return Sums(grads, count, metrics)


def mean_gradient(sums: Sums) -> PyTree:
    """The gradient of the mean loss: divided once, after all parts."""
    scale = 1.0 / jnp.maximum(sums.count, 1e-8)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), sums.grads)


def accumulate(loss: LossFn, params: PyTree, batch: PyTree, microbatches: int) -> Sums:
    """The sums of a batch cut into equal parts along its first axis.

    They are added over the parts and divided once, so the result does not depend on the number of parts,
    whatever the lengths of their rows. UserError if the parts would not be equal.
    """
    if microbatches == 1:
        return part_sums(loss, params, batch)
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % microbatches:
        raise UserError(f"microbatches={microbatches} must divide the {rows} prompts of an update")
    parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(functools.partial(part_sums, loss, params), first)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(carry: Sums, part: PyTree) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, carry, part_sums(loss, params, part)), None

    return jax.lax.scan(add, zero, parts)[0]


def apply(
    model: ModelState,
    grads: PyTree,
    optimizer: Optimizer,
    *,
    frozen: Array | bool = False,
    name: str = "",
) -> tuple[ModelState, Metrics]:
    """One optimizer step; a non-finite gradient changes nothing and is counted.

    frozen [] bool: change nothing on purpose. name: prefix of the metrics' second part.
    """
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm)
    grads = jax.tree.map(lambda g: jnp.where(finite, g, 0), grads)
    step = _streamed_step if isinstance(optimizer, Streamed) else _step
    metrics = {
        f"grad/{name}norm": Ratio(jnp.where(finite, norm, 0.0), finite.astype(jnp.float32)),
        f"update/{name}skipped": Ratio(1.0 - finite, jnp.ones(())),
    }
    return step(optimizer, model, grads, finite & jnp.logical_not(frozen)), metrics


def _step(
    optimizer: optax.GradientTransformation, model: ModelState, grads: PyTree, moves: Array
) -> ModelState:
    """The model after a step if it moves, else as it was."""
    updates, opt_state = optimizer.update(grads, model.opt_state, model.params)
    stepped = ModelState(optax.apply_updates(model.params, updates), opt_state)
    return jax.tree.map(lambda new, old: jnp.where(moves, new, old), stepped, model)


def _streamed_step(optimizer: Streamed, model: ModelState, grads: PyTree, moves: Array) -> ModelState:
    """`_step` with the moments of one parameter on the device at a time, the others in the host's memory."""
    grads, _ = optimizer.whole.update(grads, optimizer.whole.init(model.params))
    held = dict(jax.tree.leaves_with_path(model.opt_state))

    def place(where: tuple, path: tuple) -> tuple:
        return where + path if where + path in held else where  # counters belong to all

    params, structure = jax.tree.flatten_with_path(model.params)
    after: list[Array] = []
    stored: dict[tuple, Array] = {}
    last: PyTree = ()
    for (path, param), grad in zip(params, structure.flatten_up_to(grads), strict=True):
        like = jax.eval_shape(optimizer.each.init, param)
        waiting = jax.tree.map_with_path(lambda where, _, path=path: held[place(where, path)], like)
        # Fetched when the parameter before is through, or all would be fetched at once.
        waiting, _ = jax.lax.optimization_barrier((waiting, last))
        one = _step(optimizer.each, ModelState(param, _moved(waiting, jax.memory.Space.Device)), grad, moves)
        after.append(one.params)
        back = _moved(one.opt_state, jax.memory.Space.Host)
        last = (one.params, back)
        stored |= {place(where, path): x for where, x in jax.tree.leaves_with_path(back)}
    opt_state = jax.tree.map_with_path(lambda where, _: stored[where], model.opt_state)
    return ModelState(structure.unflatten(after), opt_state)


def _moved(tree: PyTree, space: Any) -> PyTree:
    """Arrays in another memory, one of `jax.memory.Space`; counters stay where they are."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, tree)


def mean_columns(x: Array, mask: Array) -> Ratio:
    """Masked sum and count."""
    return Ratio(jnp.sum(jnp.where(mask, x, 0.0)), jnp.sum(mask).astype(jnp.float32))
