"""The game of one turn: payoff matrices [..., U, A, 2] and what follows from them.

Axes: user move, assistant action, player (LLM first, then user). Functions take NumPy or JAX arrays of
any leading shape and are pure; the names are those of `game.moves`.
"""

import jax.numpy as jnp

from gtalign_jax.game.moves import LLM, USER
from gtalign_jax.types import Array


def pareto_frontier(payoff: Array) -> Array:
    """Cells that no other cell dominates: bool [..., U, A] of payoff [..., U, A, 2].

    A cell dominates another when it is at least as good for both players and better for one; equal
    cells do not dominate each other. Every pair of cells is compared; of many points,
    `game.pareto.frontier` sorts instead. A NumPy array stays one, in its own precision.
    """
    *batch, moves, actions, _ = payoff.shape
    cells = payoff.reshape(*batch, moves * actions, 2)
    # Matrices along the last axis: rows of a whole batch are what NumPy is quick at.
    axes = len(batch) + 1, len(batch), *range(len(batch))
    llm, user = cells.transpose(axes).copy()  # [C, ...] each
    no_worse = (llm[:, None] >= llm) & (user[:, None] >= user)
    dominated = (no_worse & ((llm[:, None] > llm) | (user[:, None] > user))).any(axis=0)
    return ~dominated.transpose(*range(1, len(batch) + 1), 0).reshape(payoff.shape[:-1])


def cell_welfare(payoff: Array, floor: float = -5.0) -> Array:
    """Mutual welfare of each cell [..., U, A]: the geometric mean of both payoffs above `floor`.

    Payoffs are written on about [-5, 5]; measured from the floor they are nonnegative, so two losses
    never multiply into a gain.
    """
    gains = jnp.maximum(payoff - floor, 0.0)
    return jnp.sqrt(gains[..., LLM] * gains[..., USER])


def welfare_optimal(payoff: Array, floor: float = -5.0) -> tuple[Array, Array]:
    """(user move, action) [...] int32 of the best frontier cell.

    Order (paper section 2): larger welfare, then larger user payoff, then larger LLM payoff; cells that
    tie in all three are taken in array order. Welfare W ties within 1e-5 (1 + W): for payoffs of one
    decimal on [-5, 5] that is more than rounding and less than any true difference.
    """
    shape = payoff.shape[:-1]
    flat = (*shape[:-2], -1)
    best = pareto_frontier(payoff).reshape(flat)
    criteria = ((cell_welfare(payoff, floor), 1e-5), (payoff[..., USER], 0.0), (payoff[..., LLM], 0.0))
    for criterion, slack in criteria:
        value = jnp.where(best, criterion.reshape(flat), -jnp.inf)
        top = jnp.max(value, axis=-1, keepdims=True)
        best = best & (value >= top - slack * (1.0 + jnp.abs(top)))
    index = jnp.argmax(best, axis=-1).astype(jnp.int32)
    return index // shape[-1], index % shape[-1]


def choose(payoff: Array, rule: str = "welfare") -> Array:
    """The assistant's action [...] int32 under a rule: `welfare` (the paper's), `llm` or `user`.

    `llm` and `user` take the action of the cell that is best for that player alone.
    """
    if rule == "welfare":
        return welfare_optimal(payoff)[1]
    player = {"llm": LLM, "user": USER}[rule]
    own = payoff[..., player]
    index = jnp.argmax(own.reshape(*own.shape[:-2], -1), axis=-1)
    return (index % own.shape[-1]).astype(jnp.int32)
