"""Cached generation is the same function as the whole-row forward pass."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.models.transformer import forward, init_params, unembed
from gtalign_jax.rollout import decode
from gtalign_jax.rollout.decode_state import Forced, Pause
from gtalign_jax.rollout.request import Ending, Placed, Rules
from gtalign_jax.rollout.sampling import GREEDY, SamplingConfig, processed_logits
from gtalign_jax.types import PromptBatch
from tests.small import small_model

CONFIG = small_model(61, num_layers=1)
P, G, S, N = 3, 2, 7, 9
NEVER = Rules(Ending(eos=jnp.asarray([-1, -1])))

generate, start, advance = (
    jax.jit(function, static_argnums=(1, 3)) for function in (decode.generate, decode.start, decode.advance)
)
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
    return PromptBatch(jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32))


def _placed(batch=None, n=N, row=None) -> Placed:
    return Placed(batch or _batch(), jax.random.key(5), G, n, row)


def _generate(params, sampling, placed=None, rules=NEVER, **options):
    return generate(params, CONFIG, placed or _placed(), sampling, rules, **options)


def _teacher_forced(params, rollout) -> np.ndarray:
    """Logits [P, G, N, V] that predict each completion token, from plain rows without a cache."""
    rows, lengths = [], []
    prompts, written = rollout.prompts, rollout.completions.tokens
    p, g, n = written.shape
    for i in range(p):
        prompt = np.asarray(prompts.tokens[i, : prompts.length[i]])
        for j in range(g):
            rows.append(np.concatenate([prompt, np.asarray(written[i, j])]))
            lengths.append(len(prompt))
    tokens = np.zeros((p * g, max(map(len, rows))), np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = values
    logits = np.asarray(_forward_logits(params, tokens, np.asarray([len(row) for row in rows])))
    picked = [row[length - 1 : length - 1 + n] for row, length in zip(logits, lengths, strict=True)]
    return np.stack(picked).reshape(p, g, n, -1)


@pytest.mark.parametrize("slots", [7, 16])
def test_greedy_is_the_teacher_forced_argmax_on_ragged_prompts(params, slots):
    rollout = _generate(params, GREEDY, _placed(_batch(slots)))
    made = rollout.completions
    np.testing.assert_array_equal(made.tokens, _teacher_forced(params, rollout).argmax(-1))
    assert (made.length == N).all() and not made.finished.any()


def test_sampler_logp_is_the_log_probability_of_the_forward_pass(params):
    sampling = SamplingConfig(temperature=0.8, top_p=0.95)
    rollout = _generate(params, sampling)
    logits = processed_logits(jnp.asarray(_teacher_forced(params, rollout)), sampling)
    made = rollout.completions
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), made.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(made.logp, logp, atol=1e-5)
    assert made.action_mask.all()
    assert len({tuple(row) for row in np.asarray(made.tokens).reshape(P * G, N).tolist()}) == P * G


def test_samples_do_not_depend_on_buckets_or_on_the_batch(params):
    sampling = SamplingConfig()
    whole = _generate(params, sampling).completions
    wide = _generate(params, sampling, _placed(_batch(12), n=16), until=N).completions
    np.testing.assert_array_equal(whole.tokens, wide.tokens[..., :N])
    assert not np.asarray(wide.tokens[..., N:]).any() and (wide.length == N).all()
    part = jax.tree.map(lambda x: x[1:], _batch())
    tail = _generate(params, sampling, _placed(part, row=jnp.asarray([1, 2]))).completions
    np.testing.assert_array_equal(whole.tokens[1:], tail.tokens)


def test_rows_end_at_the_end_token_and_stay_padded(params):
    free = _generate(params, SamplingConfig()).completions
    eos = int(free.tokens[0, 0, 3])
    made = _generate(params, SamplingConfig(), rules=Rules(Ending(jnp.asarray([eos, eos])))).completions
    for p, g in np.ndindex(P, G):
        row = np.asarray(free.tokens[p, g])
        at = np.flatnonzero(row == eos)
        n = at[0] + 1 if at.size else N
        assert made.length[p, g] == n and made.finished[p, g] == bool(at.size)
        np.testing.assert_array_equal(made.tokens[p, g, :n], row[:n])
        np.testing.assert_array_equal(made.action_mask[p, g], np.arange(N) < n)
        assert not np.asarray(made.tokens[p, g, n:]).any()
        assert not np.asarray(made.logp[p, g, n:]).any()


def test_the_loop_ends_with_the_last_row_and_padding_prompts_cost_nothing(params):
    placed = _placed(_batch(lengths=(4, 0, 0)))
    free = _generate(params, SamplingConfig(), placed).completions
    rules = Rules(Ending(free.tokens[0, :, 2]))
    state = start(params, CONFIG, placed, SamplingConfig(), rules)
    state = advance(params, CONFIG, state, SamplingConfig(), rules, until=N)
    made = state.completions
    assert state.t <= 3 and made.finished.all()
    assert not np.asarray(made.length[1:]).any() and np.isfinite(np.asarray(made.logp)).all()


def test_forced_tokens_are_written_not_drawn_and_the_rest_follows(params):
    free = _generate(params, SamplingConfig()).completions
    length = jnp.asarray([[4, 0], [N, 1], [2, 3]])
    made = _generate(params, SamplingConfig(), forced=Forced(free.tokens, length)).completions
    np.testing.assert_array_equal(made.tokens, free.tokens)
    given = np.arange(N) < np.asarray(length)[..., None]
    np.testing.assert_array_equal(made.action_mask, ~given)
    np.testing.assert_allclose(made.logp, np.where(given, 0, free.logp), atol=1e-5)


def test_a_forced_end_token_does_not_end_the_row(params):
    free = _generate(params, SamplingConfig()).completions
    rules, forced = Rules(Ending(free.tokens[:2, 0, 1])), Forced(free.tokens, jnp.full((P, G), 3))
    made = _generate(params, SamplingConfig(), rules=rules, forced=forced).completions
    assert (made.length >= 4).all()


def test_stopping_and_going_on_equals_an_uninterrupted_run(params):
    sampling = SamplingConfig()
    whole = _generate(params, sampling).completions
    state = start(params, CONFIG, _placed(), sampling, NEVER)
    for until in (4, 6, N):
        state = advance(params, CONFIG, state, sampling, NEVER, until=until)
        assert state.t == until
    parts = decode.to_rollout(state).completions
    np.testing.assert_array_equal(whole.tokens, parts.tokens)
    np.testing.assert_array_equal(whole.logp, parts.logp)


def test_a_pause_comes_at_the_first_step_with_few_enough_live_rows(params):
    """Not before `after`, and at the end in any case; going on from it changes nothing."""
    sampling, free = SamplingConfig(), _generate(params, SamplingConfig()).completions.tokens.reshape(-1, N)
    rules = Rules(Ending(free[np.arange(4), np.array([1, 3, 3, 6])]))
    whole = _generate(params, sampling, rules=rules).completions
    ends = np.sort(np.asarray(whole.length).ravel())  # rows that end at 1 are done before the first step
    assert len(set(ends.tolist())) > 2
    for live, after in itertools.product((0, 2, 4), (0, int(ends[-3]) + 1, N + 5)):
        state = start(params, CONFIG, _placed(), sampling, rules)
        pause = Pause(np.int32(live), np.int32(after))
        state = advance(params, CONFIG, state, sampling, rules, until=N, pause=pause)
        assert state.t == min(max(ends[P * G - live - 1], after), ends[-1])
        rest = advance(params, CONFIG, state, sampling, rules, until=N)
        np.testing.assert_array_equal(rest.completions.tokens, whole.tokens)


def test_rewinding_with_an_edit_equals_generating_with_the_edit_forced(params):
    """The cache written before the edit is kept, and what was written after it leaves no trace."""
    sampling = SamplingConfig(repetition_penalty=1.4)
    state = start(params, CONFIG, _placed(), sampling, NEVER)
    state = advance(params, CONFIG, state, sampling, NEVER, until=7)
    edited = state.completions.tokens.at[:, :, 3:5].set(11)
    forced = Forced(edited, jnp.asarray([[5, 3], [5, 5], [4, 6]]))
    state = advance(params, CONFIG, rewind(state, 3), sampling, NEVER, until=N, forced=forced)
    resumed, fresh = state.completions, _generate(params, sampling, forced=forced).completions
    np.testing.assert_array_equal(resumed.tokens, fresh.tokens)
    np.testing.assert_array_equal(resumed.length, fresh.length)
    drawn = np.asarray(fresh.action_mask)
    np.testing.assert_allclose(np.asarray(resumed.logp)[drawn], fresh.logp[drawn], atol=1e-5)


def test_the_repetition_penalty_sees_prompt_and_completion(params):
    sampling = SamplingConfig(temperature=0, repetition_penalty=1.5)
    rollout = _generate(params, sampling)
    logits = _teacher_forced(params, rollout)
    for p, g in np.ndindex(P, G):
        seen = np.zeros(CONFIG.vocab_size, bool)
        seen[np.asarray(rollout.prompts.tokens[p, : rollout.prompts.length[p]])] = True
        for t in range(N):
            z = logits[p, g, t]
            z = np.where(seen, np.where(z > 0, z / 1.5, z * 1.5), z)
            assert rollout.completions.tokens[p, g, t] == z.argmax()
            seen[z.argmax()] = True
