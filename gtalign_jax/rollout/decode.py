"""Generation as a pure function: prefill each prompt once, then one token a step for all its samples.

    state   = start(params, config, placed, sampling, rules)         prompts computed, token 0 drawn
    state   = advance(params, config, state, sampling, rules, ...)   tokens until `until`, or all rows done
    state   = rewind(state, t)                                       forget tokens from t on, keep the cache
    rollout = to_rollout(state)

`generate` is the first two and the last. Stopping, editing and going on is the whole of it: forced
tokens are written instead of drawn ones, and cache slots after t may be written again because the
attention mask comes from t. The next logits are never stored: `advance` feeds token t - 1 first, so
the last token of a row costs no step. A `Constraint` given to `start` goes to every later call too.
"""

import jax
import jax.numpy as jnp

from gtalign_jax.models import layouts
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.layouts import (
    decode_step,
    init_decode_cache,
    prefill,
    prepare_decode,
    settled,
    stepping,
)
from gtalign_jax.models.transformer import PromptCache
from gtalign_jax.rollout import grammar, writing
from gtalign_jax.rollout.decode_state import DecodeState, Forced, Pause, decided, to_rollout
from gtalign_jax.rollout.grammar import Constraint
from gtalign_jax.rollout.request import Own, Placed, Rules
from gtalign_jax.rollout.sampling import SamplingConfig, row_keys, sample_each, sample_token, token_uniform
from gtalign_jax.types import Array, Completions, PromptBatch, PyTree, Rollout


def generate(
    params: PyTree,
    config: ModelConfig,
    placed: Placed,
    sampling: SamplingConfig,
    rules: Rules,
    *,
    until: Array | int | None = None,
    forced: Forced | None = None,
) -> Rollout:
    """group_size completions of each prompt, at most placed.slots tokens each.

    until: a traced budget of at most placed.slots, so that one compiled program serves several budgets.
    """
    state = start(params, config, placed, sampling, rules, forced=forced)
    until = placed.slots if until is None else until
    return to_rollout(advance(params, config, state, sampling, rules, until=until, forced=forced))


def start(
    params: PyTree,
    config: ModelConfig,
    placed: Placed,
    sampling: SamplingConfig,
    rules: Rules,
    *,
    forced: Forced | None = None,
) -> DecodeState:
    """Compute the prompts and decide token 0 of every row. Arguments as in `generate`."""
    # An empty row gets one padding token to look at, so that nothing in it is undefined.
    length = jnp.maximum(placed.prompts.length, 1)
    computed = prefill(params, config, placed.prompts.tokens, length)
    return _begin(params, config, placed, sampling, rules, computed, forced)


def start_from(
    params: PyTree,
    config: ModelConfig,
    placed: Placed,
    sampling: SamplingConfig,
    rules: Rules,
    source: tuple[DecodeState, Array, Array],
    *,
    width: int,
) -> DecodeState:
    """`start` of one prompt whose first tokens are those of a row that decodes, prompt and completion.

    source: the state of the row (`rollout.ring`), its place, and how many of its tokens are kept, fewer than
    it has decided. width: slots for the others, which alone are computed. The prompt has the state's slots.
    """
    (state, place, kept), batch = source, placed.prompts
    ring = state.completions.tokens.shape[2]
    assert state.start is not None
    first = state.start[place, 0] % ring
    known = layouts.row_as_prompt(state.prompt_cache, state.cache, place, first, kept)
    rest = jax.lax.dynamic_slice_in_dim(jnp.pad(batch.tokens, ((0, 0), (0, width))), kept, width, axis=1)
    computed = layouts.extend(params, config, rest, batch.length - kept, known)
    return _begin(params, config, placed, sampling, rules, computed)


def _begin(
    params: PyTree,
    config: ModelConfig,
    placed: Placed,
    sampling: SamplingConfig,
    rules: Rules,
    computed: tuple[Array, PromptCache],
    forced: Forced | None = None,
) -> DecodeState:
    """Token 0 of every row decided, from what `prefill` gives."""
    batch, group_size = placed.prompts, placed.group_size
    prompts = batch.tokens.shape[0]
    shape, slots = (prompts, group_size), (prompts, group_size, placed.slots)
    logits, prompt_cache = computed
    row = jnp.arange(prompts, dtype=jnp.int32) if placed.row is None else placed.row
    sample = jnp.arange(group_size, dtype=jnp.int32)
    tokens = jnp.zeros(slots, jnp.int32)
    t = jnp.zeros((), jnp.int32)
    state = DecodeState(
        prompts=batch,
        prompt_cache=prompt_cache,
        cache=init_decode_cache(params, config, prompts, group_size, placed.slots),
        keys=row_keys(placed.key, row[:, None] * group_size + sample if row.ndim == 1 else row),
        t=t,
        completions=Completions(
            tokens=tokens,
            length=jnp.zeros(shape, jnp.int32),
            finished=jnp.broadcast_to((batch.length == 0)[:, None], shape),
            logp=jnp.zeros(slots, jnp.float32),
            action_mask=jnp.zeros(slots, bool),
        ),
        stop_state=jnp.zeros(shape, jnp.int32),
        seen=_seen(batch, tokens, t, config.vocab_size) if sampling.repetition_penalty != 1 else None,
        grammar=_begin_grammar(rules.constraint, placed.own, shape),
        own=placed.own,
        likely=writing.no_likely(slots, placed.top),
    )
    logits = jnp.broadcast_to(logits[:, None], (*shape, logits.shape[-1]))
    return _decide(state, logits, ~state.completions.finished, sampling, rules, forced)


def advance(
    params: PyTree,
    config: ModelConfig,
    state: DecodeState,
    sampling: SamplingConfig,
    rules: Rules,
    *,
    until: Array | int,
    pause: Pause | None = None,
    forced: Forced | None = None,
) -> DecodeState:
    """Decide tokens t, t + 1, ... until every row is finished or has `until` tokens.

    params: the model's, or what `prepare_decode` made of them, which a caller of several advances keeps.
    pause: when to return before that. Rows that began at different times take no forced tokens.
    """
    if forced is not None and state.start is not None:
        raise ValueError("forced tokens need rows that began together")
    params = prepare_decode(params, config)  # once, outside the loop

    def live(state: DecodeState) -> Array:
        bound = until if state.own is None else jnp.minimum(state.own.until, until)
        return ~state.completions.finished & (decided(state) < bound)

    def going(state: DecodeState) -> Array:
        if pause is None:
            return jnp.any(live(state))
        count = jnp.sum(live(state))
        return (count > pause.live) | ((count > 0) & (state.t < pause.after))

    def step(state: DecodeState) -> DecodeState:
        fed, tokens = state.t - 1, state.completions.tokens
        last = jax.lax.dynamic_index_in_dim(tokens, fed % tokens.shape[2], axis=2, keepdims=False)
        caches = (state.prompt_cache, state.cache)
        logits, cache = decode_step(params, config, last, fed, *caches, state.start)
        state = state.replace(cache=cache)
        return _decide(state, logits, live(state), sampling, rules, forced)

    with stepping(config):
        prompt_cache, cache = settled(config, state.prompt_cache, state.cache)
        return jax.lax.while_loop(going, step, state.replace(prompt_cache=prompt_cache, cache=cache))


def rewind(state: DecodeState, t: Array | int, constraint: Constraint | None = None) -> DecodeState:
    """The state when only the first t tokens (t >= 1) of every row had been decided.

    Rows that had ended go on; a row shorter than t keeps its length, and the caller forces the rest. All
    rows must have begun together.
    constraint: the one of `start`, under which the kept tokens are read again.
    """
    t, old = jnp.asarray(t, jnp.int32), state.completions
    kept = jnp.arange(old.tokens.shape[2]) < t
    tokens, length = jnp.where(kept, old.tokens, 0), jnp.minimum(old.length, t)
    seen = None
    if state.seen is not None:
        seen = _seen(state.prompts, tokens, t, state.seen.shape[-1])
    reached = None
    if constraint is not None:
        reached, _ = grammar.replay(constraint, tokens, length)
    return state.replace(
        t=t,
        completions=Completions(
            tokens=tokens,
            length=length,
            finished=jnp.broadcast_to((state.prompts.length == 0)[:, None], old.finished.shape),
            logp=jnp.where(kept, old.logp, 0),
            action_mask=kept & old.action_mask,
        ),
        stop_state=jnp.zeros_like(state.stop_state),
        seen=seen,
        grammar=reached,
    )


def _begin_grammar(
    constraint: Constraint | None, own: Own | None, shape: tuple[int, int]
) -> grammar.GrammarState | None:
    if constraint is None:
        return None
    if own is None:
        return grammar.start_state(constraint, shape)
    return grammar.state_at(constraint._replace(budget=own.until), own.at)


def _decide(
    state: DecodeState,
    logits: Array,
    live: Array,
    sampling: SamplingConfig,
    rules: Rules,
    forced: Forced | None,
) -> DecodeState:
    """Write the next token of every live [P, G] row, drawn from logits [P, G, V] or given."""
    t = decided(state)
    (ending, constraint), at = rules, state.grammar
    if constraint is not None:
        assert at is not None  # `start` was given the constraint too
        if state.own is not None:
            constraint = constraint._replace(budget=state.own.until)
        logits = grammar.masked_logits(constraint, at, logits)
    token, logp = _draw(state, t, logits, sampling)
    chosen = live
    if forced is not None:
        given = t < forced.length
        token = jnp.where(
            given, jax.lax.dynamic_index_in_dim(forced.tokens, t, axis=2, keepdims=False), token
        )
        chosen = live & ~given
    token = jnp.where(live, token, 0)
    if constraint is not None:
        assert at is not None
        at = grammar.advanced(constraint, at, token, t, live)
    stop_state = state.stop_state
    over = jnp.any(token[..., None] == ending.eos, axis=-1)
    if ending.stop is not None:
        stop_state = ending.stop[stop_state, token]
        found = stop_state == ending.stop.shape[0] - 1
        over |= found if state.own is None else found & state.own.stops
    seen = state.seen
    if seen is not None:
        p, g = jnp.indices(token.shape)
        seen = seen.at[p, g, token].max(live)
    return state.replace(
        t=state.t + 1,
        completions=writing.completions(state, live, token, jnp.where(chosen, logp, 0), chosen, over),
        stop_state=stop_state,
        seen=seen,
        grammar=at,
        likely=writing.likely(state, live, logits),
    )


def _draw(state: DecodeState, t: Array, logits: Array, sampling: SamplingConfig) -> tuple[Array, Array]:
    """Token t of every row and its log-probability [P, G], from logits [P, G, V]."""
    if state.own is None:
        return sample_token(token_uniform(state.keys, t), logits, sampling, state.seen)
    uniform = token_uniform(state.keys, t + state.own.first)
    return sample_each(uniform, logits, state.own.temperature, state.own.top_p)


def _seen(batch: PromptBatch, tokens: Array, t: Array, vocab: int) -> Array:
    """[P, G, V] bool: tokens of the prompt and of the first t completion tokens."""

    def mark(seen: Array, row: Array, length: Array) -> Array:
        inside = jnp.arange(row.shape[0]) < length
        return seen.at[row].max(inside)

    in_prompt = jax.vmap(mark)(jnp.zeros((tokens.shape[0], vocab), bool), batch.tokens, batch.length)
    over_samples = jax.vmap(mark, in_axes=(None, 0, None))
    return jax.vmap(over_samples, in_axes=(0, 0, None))(in_prompt, tokens, t)
