"""Vertices of the best-reply regions: the finitely many mixed strategies that decide a bimatrix game.

A mixed strategy x with support I is a vertex when the opponent's payoffs against it tie on its best
replies in a way that no other strategy with support I shares. Equilibria, their extreme payoffs and the
best commitment all lie on vertices, so listing them solves the game exactly.
"""

import itertools
import math

import flax.struct
import jax.numpy as jnp
import numpy as np

from gtalign_jax.types import Array


class Vertices(flax.struct.PyTreeNode):
    """Candidate strategies of a player with m moves against an opponent with n moves.

    weights [..., V, m] float, whole numbers that are not negative, proportional to the probabilities;
    replies [..., V, n] bool, the opponent's best replies; valid [..., V] bool, whether the candidate is a
    vertex. Every vertex appears once. V = m + sum over k >= 2 of C(m, k) C(n, k).
    """

    weights: Array
    replies: Array
    valid: Array

    @property
    def strategies(self) -> Array:
        """Probabilities [..., V, m]; rows that are not valid are uniform."""
        weights = jnp.where(self.valid[..., None], self.weights, 1.0)
        return weights / jnp.sum(weights, axis=-1, keepdims=True)


def best_reply_vertices(opponent: Array) -> Vertices:
    """All vertices for the payoffs `opponent` [..., m, n] that the opponent gets, in whole numbers.

    Candidates are the pure moves and, for each support I of k >= 2 moves and each set J of k replies, the
    weights that make J tie. Weights are cofactors, so no division rounds: with whole payoffs of size M,
    ties are exact in float32 for 2 moves while 8 M^2 < 4e6, and in general while intermediate values stay
    below 4e6; beyond that values within rounding error count as tied.
    """
    m, n = opponent.shape[-2:]
    parts = [_pure_candidates(opponent)]
    parts += [_mixed_candidates(opponent, k) for k in range(2, min(m, n) + 1)]
    weights, replies, valid = zip(*parts, strict=True)
    return Vertices(
        weights=jnp.concatenate(weights, axis=-2),
        replies=jnp.concatenate(replies, axis=-2),
        valid=jnp.concatenate(valid, axis=-1),
    )


def _pure_candidates(opponent: Array) -> tuple[Array, Array, Array]:
    m = opponent.shape[-2]
    weights = jnp.broadcast_to(jnp.eye(m, dtype=opponent.dtype), (*opponent.shape[:-2], m, m))
    replies = _best_replies(weights, opponent)
    return weights, replies, jnp.any(replies, axis=-1)


def _mixed_candidates(opponent: Array, k: int) -> tuple[Array, Array, Array]:
    """Candidates whose support has k moves, flattened over (I, J)."""
    m, n = opponent.shape[-2:]
    supports = np.array(list(itertools.combinations(range(m), k)))
    ties = np.array(list(itertools.combinations(range(n), k)))
    block = opponent[..., supports[:, None, :, None], ties[None, :, None, :]]
    found = _null_weights(block[..., 1:] - block[..., :1])
    positive = jnp.all(found > 0.5, axis=-1)
    place = (supports[:, None, :, None] == np.arange(m)).astype(np.float32)
    weights = jnp.sum(found[..., None] * place, axis=-2)
    replies = _best_replies(weights, opponent[..., None, :, :])
    # [..., I, J, J']: whether candidate (I, J) has all of J' among its best replies.
    contains = jnp.all(replies[..., None, :] | ~_members(ties, n), axis=-1)
    valid = positive & jnp.diagonal(contains, axis1=-2, axis2=-1)
    earlier = np.tril(np.ones((len(ties), len(ties)), bool), -1)
    # Two tie sets that the same strategy satisfies describe one vertex: keep the first.
    valid &= ~jnp.any(contains & valid[..., None, :] & earlier, axis=-1)
    flat = (*opponent.shape[:-2], -1)
    return weights.reshape(*flat, m), replies.reshape(*flat, n), valid.reshape(flat)


def _members(sets: np.ndarray, n: int) -> np.ndarray:
    """Index sets [s, k] as masks [s, n]."""
    return (sets[:, :, None] == np.arange(n)).any(axis=1)


def _null_weights(differences: Array) -> Array:
    """w [..., k] with sum_i w_i d[..., i, :] = 0 for d [..., k, k-1]: cofactors, their sum positive."""
    k = differences.shape[-2]
    others = [[row for row in range(k) if row != i] for i in range(k)]
    minors = [(-1) ** i * _determinant(differences[..., rest, :]) for i, rest in enumerate(others)]
    found = jnp.stack(minors, axis=-1)
    return jnp.where(jnp.sum(found, axis=-1, keepdims=True) < 0, -found, found)


def _determinant(matrix: Array) -> Array:
    """Determinant [...] of [..., s, s]; by expansion, exact in whole numbers, up to 3 x 3."""
    size = matrix.shape[-1]
    if size > 3:
        return jnp.linalg.det(matrix)
    signed = []
    for order in itertools.permutations(range(size)):
        swaps = sum(a > b for a, b in itertools.combinations(order, 2))
        signed.append((-1) ** swaps * math.prod(matrix[..., row, column] for row, column in enumerate(order)))
    return sum(signed)


def _best_replies(weights: Array, opponent: Array) -> Array:
    """Best replies [..., V, n] to weights [..., V, m] under payoffs [..., m, n], ties included."""
    terms = weights[..., :, None] * opponent[..., None, :, :]
    value = jnp.sum(terms, axis=-2)  # not a matmul: accelerators round those to fewer bits
    scale = jnp.max(jnp.sum(jnp.abs(terms), axis=-2), axis=-1, keepdims=True)
    slack = jnp.maximum(0.5, 2.0 * jnp.finfo(value.dtype).eps * scale)
    return value >= jnp.max(value, axis=-1, keepdims=True) - slack
