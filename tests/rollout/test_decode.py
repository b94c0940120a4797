"""Cached generation is the same function as the whole-row forward pass."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.transformer import forward, init_params, unembed
from gtalign_jax.rollout import decode
from gtalign_jax.rollout.decode import Ending, Forced, Pause
from gtalign_jax.rollout.sampling import GREEDY, SamplingConfig, processed_logits
from gtalign_jax.types import PromptBatch

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    initializer_range=0.3,
)
P, G, S, N = 3, 2, 7, 9
NEVER = Ending(eos=jnp.asarray([-1, -1]))

_static = functools.partial(jax.jit, static_argnums=(1, 4), static_argnames=("group_size", "max_new_tokens"))
generate = _static(decode.generate)
start = _static(decode.start)
advance = jax.jit(decode.advance, static_argnums=(1, 3))
rewind = jax.jit(decode.rewind)


@jax.jit
def _forward_logits(params, tokens, length):
    return unembed(params, CONFIG, forward(params, CONFIG, tokens, length))


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=1)(jax.random.key(0), CONFIG)


def _batch(slots: int = S, lengths=(7, 3, 1)) -> PromptBatch:
    rng = np.random.default_rng(3)
    tokens = np.zeros((len(lengths), slots), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = rng.integers(0, CONFIG.vocab_size, length)
    return PromptBatch(jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32), jnp.arange(len(lengths)))


def _generate(params, sampling, *, slots=S, n=N, batch=None, ending=NEVER, **options):
    batch = batch or _batch(slots)
    key = jax.random.key(5)
    return generate(
        params, CONFIG, batch, key, sampling, group_size=G, max_new_tokens=n, ending=ending, **options
    )


def _teacher_forced(params, rollout) -> np.ndarray:
    """Logits [P, G, N, V] that predict each completion token, from plain rows without a cache."""
    rows, lengths = [], []
    p, g, n = rollout.completion.shape
    for i in range(p):
        prompt = np.asarray(rollout.prompt[i, : rollout.prompt_length[i]])
        for j in range(g):
            rows.append(np.concatenate([prompt, np.asarray(rollout.completion[i, j])]))
            lengths.append(len(prompt))
    tokens = np.zeros((p * g, max(map(len, rows))), np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = values
    logits = np.asarray(_forward_logits(params, tokens, np.asarray([len(row) for row in rows])))
    picked = [row[length - 1 : length - 1 + n] for row, length in zip(logits, lengths, strict=True)]
    return np.stack(picked).reshape(p, g, n, -1)


@pytest.mark.parametrize("slots", [7, 16])
def test_greedy_is_the_teacher_forced_argmax_on_ragged_prompts(params, slots):
    rollout = _generate(params, GREEDY, slots=slots)
    np.testing.assert_array_equal(rollout.completion, _teacher_forced(params, rollout).argmax(-1))
    assert (rollout.length == N).all() and not rollout.finished.any()


def test_sampler_logp_is_the_log_probability_of_the_forward_pass(params):
    sampling = SamplingConfig(temperature=0.8, top_p=0.95)
    rollout = _generate(params, sampling)
    logits = processed_logits(jnp.asarray(_teacher_forced(params, rollout)), sampling)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), rollout.completion[..., None], axis=-1)[
        ..., 0
    ]
    np.testing.assert_allclose(rollout.sampler_logp, logp, atol=1e-5)
    assert rollout.action_mask.all()
    assert len({tuple(row) for row in np.asarray(rollout.completion).reshape(P * G, N).tolist()}) == P * G


def test_samples_do_not_depend_on_buckets_or_on_the_batch(params):
    sampling = SamplingConfig()
    whole = _generate(params, sampling)
    wide = _generate(params, sampling, slots=12, n=16, until=N)
    np.testing.assert_array_equal(whole.completion, wide.completion[..., :N])
    assert not np.asarray(wide.completion[..., N:]).any() and (wide.length == N).all()
    batch = _batch()
    part = jax.tree.map(lambda x: x[1:], batch)
    tail = _generate(params, sampling, batch=part, row=jnp.asarray([1, 2]))
    np.testing.assert_array_equal(whole.completion[1:], tail.completion)


def test_rows_end_at_the_end_token_and_stay_padded(params):
    free = _generate(params, SamplingConfig())
    eos = int(free.completion[0, 0, 3])
    rollout = _generate(params, SamplingConfig(), ending=Ending(jnp.asarray([eos, eos])))
    for p, g in np.ndindex(P, G):
        row = np.asarray(free.completion[p, g])
        at = np.flatnonzero(row == eos)
        n = at[0] + 1 if at.size else N
        assert rollout.length[p, g] == n and rollout.finished[p, g] == bool(at.size)
        np.testing.assert_array_equal(rollout.completion[p, g, :n], row[:n])
        np.testing.assert_array_equal(rollout.action_mask[p, g], np.arange(N) < n)
        assert not np.asarray(rollout.completion[p, g, n:]).any()
        assert not np.asarray(rollout.sampler_logp[p, g, n:]).any()


def test_the_loop_ends_with_the_last_row_and_padding_prompts_cost_nothing(params):
    batch = _batch(lengths=(4, 0, 0))
    free = _generate(params, SamplingConfig(), batch=batch)
    ending = Ending(free.completion[0, :, 2])
    key, sizes = jax.random.key(5), {"group_size": G, "max_new_tokens": N, "ending": ending}
    state = start(params, CONFIG, batch, key, SamplingConfig(), **sizes)
    state = advance(params, CONFIG, state, SamplingConfig(), until=N, ending=ending)
    assert state.t <= 3 and state.done.all()
    assert not np.asarray(state.length[1:]).any() and np.isfinite(np.asarray(state.logp)).all()


def test_forced_tokens_are_written_not_drawn_and_the_rest_follows(params):
    free = _generate(params, SamplingConfig())
    length = jnp.asarray([[4, 0], [N, 1], [2, 3]])
    rollout = _generate(params, SamplingConfig(), forced=Forced(free.completion, length))
    np.testing.assert_array_equal(rollout.completion, free.completion)
    given = np.arange(N) < np.asarray(length)[..., None]
    np.testing.assert_array_equal(rollout.action_mask, ~given)
    np.testing.assert_allclose(rollout.sampler_logp, np.where(given, 0, free.sampler_logp), atol=1e-5)


def test_a_forced_end_token_does_not_end_the_row(params):
    free = _generate(params, SamplingConfig())
    ending = Ending(free.completion[:2, 0, 1])
    rollout = _generate(
        params, SamplingConfig(), ending=ending, forced=Forced(free.completion, jnp.full((P, G), 3))
    )
    assert (rollout.length >= 4).all()


def test_stopping_and_going_on_equals_an_uninterrupted_run(params):
    sampling, sizes = SamplingConfig(), {"group_size": G, "max_new_tokens": N, "ending": NEVER}
    whole = _generate(params, sampling)
    state = start(params, CONFIG, _batch(), jax.random.key(5), sampling, **sizes)
    for until in (4, 6, N):
        state = advance(params, CONFIG, state, sampling, until=until, ending=NEVER)
        assert state.t == until
    parts = decode.to_rollout(state)
    np.testing.assert_array_equal(whole.completion, parts.completion)
    np.testing.assert_array_equal(whole.sampler_logp, parts.sampler_logp)


def test_a_pause_comes_at_the_first_step_with_few_enough_live_rows(params):
    """Not before `after`, and at the end in any case; going on from it changes nothing."""
    sampling, free = SamplingConfig(), _generate(params, SamplingConfig()).completion.reshape(-1, N)
    ending = Ending(free[np.arange(4), np.array([1, 3, 3, 6])])
    whole = _generate(params, sampling, ending=ending)
    sizes = {"group_size": G, "max_new_tokens": N, "ending": ending}
    ends = np.sort(np.asarray(whole.length).ravel())  # rows that end at 1 are done before the first step
    assert len(set(ends.tolist())) > 2
    for live, after in itertools.product((0, 2, 4), (0, int(ends[-3]) + 1, N + 5)):
        state = start(params, CONFIG, _batch(), jax.random.key(5), sampling, **sizes)
        pause = Pause(np.int32(live), np.int32(after))
        state = advance(params, CONFIG, state, sampling, until=N, ending=ending, pause=pause)
        assert state.t == min(max(ends[P * G - live - 1], after), ends[-1])
        rest = advance(params, CONFIG, state, sampling, until=N, ending=ending)
        np.testing.assert_array_equal(rest.tokens, whole.completion)


def test_rewinding_with_an_edit_equals_generating_with_the_edit_forced(params):
    """The cache written before the edit is kept, and what was written after it leaves no trace."""
    sampling = SamplingConfig(repetition_penalty=1.4)
    sizes = {"group_size": G, "max_new_tokens": N, "ending": NEVER}
    state = start(params, CONFIG, _batch(), jax.random.key(5), sampling, **sizes)
    state = advance(params, CONFIG, state, sampling, until=7, ending=NEVER)
    edited = state.tokens.at[:, :, 3:5].set(11)
    forced = Forced(edited, jnp.asarray([[5, 3], [5, 5], [4, 6]]))
    resumed = advance(params, CONFIG, rewind(state, 3), sampling, until=N, ending=NEVER, forced=forced)
    fresh = _generate(params, sampling, forced=forced)
    np.testing.assert_array_equal(resumed.tokens, fresh.completion)
    np.testing.assert_array_equal(resumed.length, fresh.length)
    drawn = np.asarray(fresh.action_mask)
    np.testing.assert_allclose(np.asarray(resumed.logp)[drawn], fresh.sampler_logp[drawn], atol=1e-5)


def test_the_repetition_penalty_sees_prompt_and_completion(params):
    sampling = SamplingConfig(temperature=0, repetition_penalty=1.5)
    rollout = _generate(params, sampling)
    logits = _teacher_forced(params, rollout)
    for p, g in np.ndindex(P, G):
        seen = np.zeros(CONFIG.vocab_size, bool)
        seen[np.asarray(rollout.prompt[p, : rollout.prompt_length[p]])] = True
        for t in range(N):
            z = logits[p, g, t]
            z = np.where(seen, np.where(z > 0, z / 1.5, z * 1.5), z)
            assert rollout.completion[p, g, t] == z.argmax()
            seen[z.argmax()] = True
