"""What a generation holds between two calls, and what it is told about forced tokens and pauses."""

from typing import NamedTuple

import flax.struct

from gtalign_jax.models.cpu import RowCache
from gtalign_jax.models.transformer import DecodeCache, PromptCache
from gtalign_jax.rollout.grammar import GrammarState
from gtalign_jax.rollout.request import Own
from gtalign_jax.types import Array, Completions, PromptBatch, Rollout


class Forced(NamedTuple):
    """Given tokens: token n of a row is tokens[p, g, n] for n < length[p, g], and drawn after that.

    tokens [P, G, N] int32, length [P, G] int32. A given token never ends its row.
    """

    tokens: Array
    length: Array


class Pause(NamedTuple):
    """When `advance` returns before its rows are done: when at most `live` rows are live and t >= `after`.

    Both int32 [], traced, so that one program serves every pause.
    """

    live: Array
    after: Array


class Likely(flax.struct.PyTreeNode):
    """The most likely tokens beside each that was written, the likeliest first, of rows that asked.

    tokens [P, G, N, K] int32; logp [P, G, N, K] float32: the model's, before temperature and filter.
    """

    tokens: Array
    logp: Array


class DecodeState(flax.struct.PyTreeNode):
    """A generation that can be stopped, edited and resumed.

    prompts, prompt_cache: as given, and their K/V. cache: K/V of completion tokens before t - 1.
    keys [P, G]: row keys. t [] int32: completion tokens decided so far, the same for all rows.
    completions [P, G, N]: what is written so far; a finished row writes no more, and rows of padding prompts
    are. stop_state [P, G] int32: state of the stop automaton. seen [P, G, V] bool or None: tokens under the
    repetition penalty. grammar: rows [P, G] under a constraint, or None.
    start [P, G] int32 or None: the step at which each row's token 0 was decided, where rows began at
    different times (`rollout.ring`). Such a row has decided t - start tokens, and its token n is in slot
    (start + n) % N of the cache and of the completions. own: replaces the sampling and bounds the `until` of
    `advance` where each row has its own, and their `logp` is the model's, before temperature and filter.
    likely: beside the completions' tokens, or None.
    """

    prompts: PromptBatch
    prompt_cache: PromptCache
    cache: DecodeCache | RowCache
    keys: Array
    t: Array
    completions: Completions
    stop_state: Array
    seen: Array | None
    grammar: GrammarState | None = None
    start: Array | None = None
    own: Own | None = None
    likely: Likely | None = None


def decided(state: DecodeState) -> Array:
    """Tokens that each row has decided, were it not finished: int32 [], or [P, G] with different starts."""
    return state.t if state.start is None else state.t - state.start


def to_rollout(state: DecodeState) -> Rollout:
    """What has been written so far."""
    return Rollout(state.prompts, state.completions)
