"""Completions of a group in fewer rows: what a model reads, and the way back to [P, G, N].

A group's completions are rarely all as long as its longest. Laid end to end in R rows of W slots
(`types.Packing`) their padding is not computed. Each still sees its prompt and its own past alone, so every
number is that of the padded layout. Everything that is not a model's pass stays [P, G, N].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gtalign_jax.models.transformer import Segments
from gtalign_jax.types import Array, Packing, PyTree

Score = Callable[[Array, PyTree, Segments | None], Any]


def in_packed_rows(
    score: Score, packing: Packing | None, completion: Array, length: Array, at: PyTree | None = None
) -> Any:
    """score(completion, at, segments) of packed rows [P, R, W], its arrays brought back to [P, G, N].

    completion [P, G, N] int32, length [P, G] int32, at: a pytree of [P, G, N] or None, zeros where no token
    stands. Columns past a length are finite and meaningless; a number [] stays as it is. Without a packing
    the score of the arrays as they are.
    """
    if packing is None:
        return score(completion, at, None)
    slot = slots_of(packing, length, completion.shape[-1])

    def rows(x: Array, spare: int) -> Array:
        return _into_rows(x, slot, packing.shape, spare)

    column = jnp.broadcast_to(jnp.arange(completion.shape[-1], dtype=jnp.int32), completion.shape)
    number = jnp.broadcast_to(jnp.arange(completion.shape[1], dtype=jnp.int32)[:, None], completion.shape)
    segments = Segments(ids=rows(number, completion.shape[1]), positions=rows(column, 0))
    packed_at = jax.tree.map(lambda x: rows(x, 0), at)
    found = score(rows(completion, 0), packed_at, segments)
    return jax.tree.map(lambda x: _from_rows(x, slot) if x.ndim else x, found)


def slots_of(packing: Packing, length: Array, width: int) -> Array:
    """The slot [P, G, N] of every token among the R*W of its prompt; past a length, R*W, which is none."""
    column = jnp.arange(width, dtype=jnp.int32)
    rows, slots = packing.shape
    return jnp.where(column < length[..., None], packing.start[..., None] + column, rows * slots)


def _into_rows(x: Array, slot: Array, shape: tuple[int, int], spare: int) -> Array:
    """[P, R, W] with x [P, G, N] at its slots and `spare` elsewhere."""
    prompts = x.shape[0]
    empty = jnp.full((prompts, shape[0] * shape[1]), spare, x.dtype)
    put = jax.vmap(lambda row, at, values: row.at[at].set(values, mode="drop"))
    return put(empty, slot.reshape(prompts, -1), x.reshape(prompts, -1)).reshape(prompts, *shape)


def _from_rows(x: Array, slot: Array) -> Array:
    """[P, G, N] of x [P, R, W]; what stands nowhere is some number of x."""
    take = jax.vmap(lambda row, at: row.at[at].get(mode="clip"))
    return take(x.reshape(len(x), -1), slot.reshape(len(x), -1)).reshape(slot.shape)
