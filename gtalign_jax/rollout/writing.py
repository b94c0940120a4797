"""What a step leaves in a generation: its tokens, and what was likely beside them."""

import jax
import jax.numpy as jnp

from gtalign_jax.rollout.decode_state import DecodeState, Likely, decided
from gtalign_jax.rollout.sampling import most_likely
from gtalign_jax.types import Array, Completions


def completions(
    state: DecodeState, live: Array, token: Array, logp: Array, chosen: Array, over: Array
) -> Completions:
    """The completions with the tokens of step t, all [P, G]; chosen: by the policy; over: a row's last."""
    old, t = state.completions, decided(state)
    return Completions(
        tokens=_put(state, live, old.tokens, token),
        length=jnp.where(live, t + 1, old.length),
        finished=old.finished | (chosen & over),
        logp=_put(state, live, old.logp, logp),
        action_mask=_put(state, live, old.action_mask, chosen),
    )


def likely(state: DecodeState, live: Array, logits: Array) -> Likely | None:
    """The likely tokens with those of step t, which are looked for when a live row asks."""
    old, own = state.likely, state.own
    if old is None or own is None:
        return old

    def look() -> tuple[Array, Array]:
        return most_likely(logits, old.tokens.shape[-1])

    def leave() -> tuple[Array, Array]:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(look))

    tokens, logp = jax.lax.cond(jnp.any(own.top & live), look, leave)
    return Likely(_put(state, live, old.tokens, tokens), _put(state, live, old.logp, logp))


def _put(state: DecodeState, live: Array, old: Array, value: Array) -> Array:
    """old [P, G, N, ...] with value [P, G, ...] in the slot of step t."""
    slot = state.t % old.shape[2]
    if state.start is not None:  # a row that is done keeps what it wrote when the ring comes round
        kept = jax.lax.dynamic_index_in_dim(old, slot, axis=2, keepdims=False)
        value = jnp.where(live.reshape(*live.shape, *[1] * (value.ndim - 2)), value, kept)
    return jax.lax.dynamic_update_index_in_dim(old, value, slot, axis=2)


def no_likely(slots: tuple[int, int, int], count: int) -> Likely | None:
    """Room for `count` likely tokens beside each of slots [P, G, N]; None for none."""
    shape = (*slots, count)
    return Likely(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)) if count else None
