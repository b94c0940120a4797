"""Games in turns, played by tables of logits, and self-play by policy gradient: pure functions of arrays.

A policy is `logits` [2, O, A]: of each player, after each observation, over the actions. Shapes: E episodes,
T turns, O observations, A actions.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gtalign_jax.types import Array, PyTree


class Environment(NamedTuple):
    """A game of two players that move in turns.

    turns: the most there are. legal [O, A] bool: the actions after an observation. start(key) -> state;
    observe(state) -> (player, observation), int32, of whose turn it is; step(state, action) ->
    (state, reward [2] float32, done bool).
    """

    turns: int
    legal: Array
    start: Callable[[Array], PyTree]
    observe: Callable[[PyTree], tuple[Array, Array]]
    step: Callable[[PyTree, Array], tuple[PyTree, Array, Array]]


class Episodes(flax.struct.PyTreeNode):
    """Played games [E, T]: who moved after what, and what both earned; `live` until the game is over."""

    player: Array
    observation: Array
    action: Array
    reward: Array  # [E, T, 2]
    live: Array


class Curve(flax.struct.PyTreeNode):
    """What a policy was after each update: policy [steps, 2, O, A] probabilities, earned [steps, 2] means."""

    policy: Array
    earned: Array


def probabilities(env: Environment, logits: Array) -> Array:
    """The policy [2, O, A]: softmax over the legal actions."""
    return jax.nn.softmax(jnp.where(env.legal, logits, -jnp.inf), axis=-1)


def play(env: Environment, logits: Array, key: Array, episodes: int) -> Episodes:
    """Games played by the policy against itself."""
    return jax.vmap(lambda one: _play_one(env, logits, one))(jax.random.split(key, episodes))


def _play_one(env: Environment, logits: Array, key: Array) -> Episodes:
    def turn(carry: tuple[PyTree, Array], key: Array) -> tuple[tuple[PyTree, Array], Episodes]:
        state, live = carry
        player, observation = env.observe(state)
        chances = jnp.where(env.legal[observation], logits[player, observation], -jnp.inf)
        action = jax.random.categorical(key, chances)
        state, reward, done = env.step(state, action)
        written = Episodes(player, observation, action, jnp.where(live, reward, 0.0), live)
        return (state, live & ~done), written

    first, *keys = jax.random.split(key, env.turns + 1)
    _, played = jax.lax.scan(turn, (env.start(first), jnp.asarray(True)), jnp.stack(keys))
    return played


def policy_gradient_loss(env: Environment, logits: Array, played: Episodes, entropy: float) -> Array:
    """REINFORCE: the mean over moves of -log pi(a|o) (G - b) - entropy bonus, G the return from there on.

    b is G's mean over all episodes that are live at the turn, of the player who moves then.
    """
    live = played.live.astype(jnp.float32)
    to_go = jnp.cumsum(played.reward[:, ::-1], axis=1)[:, ::-1]
    mine = jnp.take_along_axis(to_go, played.player[..., None], axis=-1)[..., 0]
    baseline = jnp.sum(mine * live, axis=0) / jnp.maximum(jnp.sum(live, axis=0), 1.0)
    pi = probabilities(env, logits)[played.player, played.observation]
    logp = jnp.log(jnp.maximum(pi, 1e-12))
    taken = jnp.take_along_axis(logp, played.action[..., None], axis=-1)[..., 0]
    bonus = -jnp.sum(pi * logp, axis=-1)
    gain = taken * jax.lax.stop_gradient(mine - baseline) + entropy * bonus
    return -jnp.sum(gain * live) / jnp.sum(live)


def self_play(
    env: Environment, key: Array, steps: int, *, episodes: int = 256, lr: float = 0.05, entropy: float = 0.0
) -> Curve:
    """Both players learn at once from games against each other, from uniform policies; Adam."""
    optimizer = optax.adam(lr)
    logits = jnp.zeros((2, *env.legal.shape))

    def update(carry: tuple[Array, PyTree], key: Array) -> tuple[tuple[Array, PyTree], Curve]:
        logits, state = carry
        played = play(env, logits, key, episodes)
        gradient = jax.grad(lambda x: policy_gradient_loss(env, x, played, entropy))(logits)
        change, state = optimizer.update(gradient, state)
        logits = logits + change
        earned = jnp.mean(jnp.sum(played.reward, axis=1), axis=0)
        return (logits, state), Curve(probabilities(env, logits), earned)

    _, curve = jax.lax.scan(update, (logits, optimizer.init(logits)), jax.random.split(key, steps))
    return curve
