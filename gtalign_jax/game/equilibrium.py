"""Equilibria of the matrix game [..., U, A, 2] and what they cost: pure functions, jit- and vmap-able.

Mixed strategies are decided in whole multiples of `unit` (payoffs are written with one decimal, edits may
add a second), so that ties are ties whatever the floats behind them. Payoffs must be finite.
"""

import flax.struct
import jax.numpy as jnp

from gtalign_jax.game.moves import LLM, USER
from gtalign_jax.game.payoff import cell_welfare
from gtalign_jax.game.vertices import Vertices, best_reply_vertices
from gtalign_jax.types import Array

UNIT = 0.01


class Equilibria(flax.struct.PyTreeNode):
    """Extreme equilibria in E slots, of which `mask` [..., E] bool are filled.

    user [..., E, U] and llm [..., E, A]: the mixed strategies (uniform in an empty slot); value
    [..., E, 2]: expected payoffs (LLM, user), 0 in an empty slot; degenerate [...]: whether some strategy
    has more best replies than moves in its support.
    """

    user: Array
    llm: Array
    value: Array
    mask: Array
    degenerate: Array


def best_responses(payoff: Array) -> tuple[Array, Array]:
    """Cells [..., U, A] bool where the user, and where the LLM, cannot gain by moving alone; ties count."""
    user, llm = payoff[..., USER], payoff[..., LLM]
    return user >= jnp.max(user, axis=-2, keepdims=True), llm >= jnp.max(llm, axis=-1, keepdims=True)


def pure_nash(payoff: Array) -> Array:
    """Pure Nash equilibria [..., U, A] bool: cells where both players best-respond."""
    user, llm = best_responses(payoff)
    return user & llm


def mixed_nash(payoff: Array, unit: float = UNIT) -> Equilibria:
    """All extreme Nash equilibria, pure ones included, by support enumeration.

    In a nondegenerate game these are all equilibria, and both supports of each have the same size. In a
    degenerate game (ties among best replies) there may be infinitely many; the slots then hold the pairs
    of vertices that are equilibria, supports of unequal size included: every equilibrium is a mixture of
    listed strategies that are equilibria with each other, so the best and the worst expected payoffs over
    all equilibria are among `value`. Each is listed once. E = 30 for 2 x 3.
    """
    users, llms = _vertices(payoff, unit)
    mask = users.valid[..., :, None] & llms.valid[..., None, :]
    mask &= _only_replies(llms.weights[..., None, :, :], users.replies[..., :, None, :])
    mask &= _only_replies(users.weights[..., :, None, :], llms.replies[..., None, :, :])
    x, y = users.strategies, llms.strategies
    slots = (*mask.shape[:-2], mask.shape[-2] * mask.shape[-1])
    x = jnp.broadcast_to(x[..., :, None, :], (*mask.shape, x.shape[-1])).reshape(*slots, -1)
    y = jnp.broadcast_to(y[..., None, :, :], (*mask.shape, y.shape[-1])).reshape(*slots, -1)
    mask = mask.reshape(slots)
    filled = mask[..., None]
    return Equilibria(
        user=jnp.where(filled, x, 1.0 / x.shape[-1]),
        llm=jnp.where(filled, y, 1.0 / y.shape[-1]),
        value=jnp.where(filled, _expected(x, y, payoff), 0.0),
        mask=mask,
        degenerate=_many_replies(users) | _many_replies(llms),
    )


def _only_replies(weights: Array, replies: Array) -> Array:
    """Whether all moves that are played, of [..., moves], are best replies."""
    return jnp.all(replies | (weights <= 0), axis=-1)


def _vertices(payoff: Array, unit: float) -> tuple[Vertices, Vertices]:
    """Vertices of the user's strategies (the LLM replies) and of the LLM's (the user replies)."""
    whole = jnp.round(jnp.asarray(payoff, jnp.result_type(float)) / unit)
    return best_reply_vertices(whole[..., LLM]), best_reply_vertices(jnp.swapaxes(whole[..., USER], -1, -2))


def _many_replies(vertices: Vertices) -> Array:
    """Whether a vertex [...] has more best replies than moves in its support."""
    support = jnp.sum(vertices.weights > 0, axis=-1)
    return jnp.any(vertices.valid & (jnp.sum(vertices.replies, axis=-1) > support), axis=-1)


def _expected(x: Array, y: Array, payoff: Array) -> Array:
    """Expected payoffs [..., E, 2] of the strategies x [..., E, U] and y [..., E, A]."""
    chance = x[..., :, None] * y[..., None, :]
    return jnp.sum(chance[..., None] * payoff[..., None, :, :, :], axis=(-3, -2))


def stackelberg(payoff: Array, optimistic: bool = True) -> tuple[Array, Array]:
    """(user move, action) [...] int32 when the assistant commits to an action and the user replies.

    The user plays a best reply; among several, the one best for the assistant (`optimistic`, the strong
    Stackelberg solution) or worst for it (the weak one), then the first. The assistant takes the action
    with its highest payoff; ties go to the higher user payoff, then to the first action.
    """
    user, llm = payoff[..., USER], payoff[..., LLM]
    sign = 1.0 if optimistic else -1.0
    reply = jnp.argmax(jnp.where(best_responses(payoff)[0], sign * llm, -jnp.inf), axis=-2)
    own, theirs = (jnp.take_along_axis(x, reply[..., None, :], axis=-2)[..., 0, :] for x in (llm, user))
    best = own >= jnp.max(own, axis=-1, keepdims=True)
    action = jnp.argmax(jnp.where(best, theirs, -jnp.inf), axis=-1)
    move = jnp.take_along_axis(reply, action[..., None], axis=-1)[..., 0]
    return move.astype(jnp.int32), action.astype(jnp.int32)


def stackelberg_mixed(payoff: Array, unit: float = UNIT) -> tuple[Array, Array, Array]:
    """The best mixed commitment of the assistant: (llm [..., A], user move [...] int32, value [..., 2]).

    The user plays a best reply, ties broken for the assistant (strong Stackelberg). The optimum lies on a
    vertex; among equally good ones the first, pure actions before mixtures.
    """
    _, llms = _vertices(payoff, unit)
    y = llms.strategies
    value = jnp.sum(y[..., :, None, :, None] * payoff[..., None, :, :, :], axis=-2)  # [..., V, U, 2]
    allowed = llms.valid[..., None] & llms.replies
    own = jnp.where(allowed, value[..., LLM], -jnp.inf).reshape(*allowed.shape[:-2], -1)
    # Rounding of the mixtures must not beat an equally good pure action that stands before them.
    best = jnp.argmax(own >= jnp.max(own, axis=-1, keepdims=True) - 1e-5, axis=-1)
    vertex, move = best // allowed.shape[-1], best % allowed.shape[-1]
    chosen = jnp.take_along_axis(y, vertex[..., None, None], axis=-2)[..., 0, :]
    pairs = value.reshape(*own.shape, 2)
    return (
        chosen,
        move.astype(jnp.int32),
        jnp.take_along_axis(pairs, best[..., None, None], axis=-2)[..., 0, :],
    )


def dominant_strategies(payoff: Array) -> tuple[Array, Array]:
    """Strictly dominant moves: the user's [..., U] and the LLM's [..., A] bool, at most one of each."""

    def dominant(own: Array) -> Array:
        beats = jnp.all(own[..., :, None, :] > own[..., None, :, :], axis=-1)
        return jnp.all(beats | jnp.eye(own.shape[-2], dtype=bool), axis=-1)

    return dominant(payoff[..., USER]), dominant(jnp.swapaxes(payoff[..., LLM], -1, -2))


def improvable(payoff: Array) -> Array:
    """Cells [..., U, A] bool to which some other cell is strictly better for both players."""
    points = payoff.reshape(*payoff.shape[:-3], -1, 2)
    better = jnp.all(points[..., None, :, :] > points[..., :, None, :], axis=-1)
    return jnp.any(better, axis=-1).reshape(payoff.shape[:-1])


def prisoners_dilemma(payoff: Array) -> Array:
    """Whether [...] both players have a strictly dominant move and both lose by playing it."""
    user, llm = dominant_strategies(payoff)
    return jnp.any(user[..., :, None] & llm[..., None, :] & improvable(payoff), axis=(-2, -1))


def social_dilemma(payoff: Array) -> Array:
    """Whether [...] there is a pure Nash equilibrium and another cell strictly improves on each for both.

    The weaker sense in which the paper's example is a prisoner's dilemma: nobody needs a dominant move.
    """
    nash = pure_nash(payoff)
    return jnp.any(nash, axis=(-2, -1)) & jnp.all(~nash | improvable(payoff), axis=(-2, -1))


def price_of_anarchy(payoff: Array, floor: float = -5.0, unit: float = UNIT) -> Array:
    """The best cell's welfare over the worst equilibrium's [...], at least 1; 1 means selfishness is free.

    Welfare is `cell_welfare` above `floor`, in expectation over a mixed equilibrium; all mixed equilibria
    are considered, those between the listed ones included (expected welfare is linear in each strategy,
    so its minimum is at a listed one). Infinite when only the equilibrium's welfare is 0, 1 when both are.
    """
    welfare = cell_welfare(jnp.asarray(payoff, jnp.result_type(float)), floor)
    found = mixed_nash(payoff, unit)
    expected = _expected(found.user, found.llm, welfare[..., None])[..., 0]
    worst = jnp.min(jnp.where(found.mask, expected, jnp.inf), axis=-1)
    best = jnp.max(welfare, axis=(-2, -1))
    ratio = best / jnp.where(worst > 0, worst, 1.0)
    return jnp.where(worst > 0, jnp.maximum(ratio, 1.0), jnp.where(best > 0, jnp.inf, 1.0))
