"""Gradients of a loss given as sum and count, over micro-batches, and the step they lead to."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gtalign_jax.errors import UserError
from gtalign_jax.types import Array, Learner, PyTree, Ratio

LossFn = Callable[[PyTree, PyTree], tuple[Ratio, dict[str, Ratio]]]


def accumulate(
    loss: LossFn, params: PyTree, batch: PyTree, microbatches: int
) -> tuple[PyTree, dict[str, Ratio]]:
    """(gradient of the mean loss, metrics) over a batch cut into equal parts along its first axis.

    Sums are added over the parts and divided once, so the result does not depend on the number of
    parts, whatever the lengths of their rows. UserError if the parts would not be equal.
    """

    def total(params, part):
        ratio, metrics = loss(params, part)
        return ratio.total, (ratio.count, metrics)

    def of_part(part):
        (_, (count, metrics)), grads = jax.value_and_grad(total, has_aux=True)(params, part)
        return grads, count, metrics

    if microbatches == 1:
        grads, count, metrics = of_part(batch)
    else:
        rows = jax.tree.leaves(batch)[0].shape[0]
        if rows % microbatches:
            raise UserError(f"microbatches={microbatches} must divide the {rows} prompts of an update")
        parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
        zero = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts)),
        )
        add = lambda carry, part: (jax.tree.map(jnp.add, carry, of_part(part)), None)
        (grads, count, metrics), _ = jax.lax.scan(add, zero, parts)
    scale = 1.0 / jnp.maximum(count, 1e-8)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), metrics


def apply(
    learner: Learner,
    grads: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    frozen: Array | bool = False,
    name: str = "",
) -> tuple[Learner, dict[str, Ratio]]:
    """One optimizer step; a non-finite gradient changes nothing and is counted.

    frozen [] bool: change nothing on purpose. name: prefix of the metrics' second part. Moments that wait
    in the host's memory are fetched for the step and go back there.
    """
    waiting, learner = learner, learner.replace(opt_state=jax.tree.map(_fetched, learner.opt_state))
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm)
    grads = jax.tree.map(lambda g: jnp.where(finite, g, 0), grads)
    updates, opt_state = optimizer.update(grads, learner.opt_state, learner.params)
    stepped = Learner(optax.apply_updates(learner.params, updates), opt_state)
    moves = finite & jnp.logical_not(frozen)
    kept = jax.tree.map(lambda new, old: jnp.where(moves, new, old), stepped, learner)
    kept = kept.replace(opt_state=jax.tree.map(_put_back, kept.opt_state, waiting.opt_state))
    metrics = {
        f"grad/{name}norm": Ratio(jnp.where(finite, norm, 0.0), finite.astype(jnp.float32)),
        f"update/{name}skipped": Ratio(1.0 - finite, jnp.ones(())),
    }
    return kept, metrics


def _waits_on_host(x: Array) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _fetched(x: Array) -> Array:
    return jax.device_put(x, jax.memory.Space.Device) if _waits_on_host(x) else x


def _put_back(x: Array, was: Array) -> Array:
    return jax.device_put(x, jax.memory.Space.Host) if _waits_on_host(was) else x


def mean_columns(x: Array, mask: Array) -> Ratio:
    """Masked sum and count."""
    return Ratio(jnp.sum(jnp.where(mask, x, 0.0)), jnp.sum(mask).astype(jnp.float32))
