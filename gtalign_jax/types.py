"""Every pytree that crosses a room, and the axis legend all docstrings use.

Axes
    P  prompts in a batch            G  samples per prompt; row p*G + g of the flat axis B = P*G
    S  prompt slots (a bucket)       N  completion slots (a bucket)      T  slots of a plain token row
    V  vocabulary    D  model width  L  layers    K  key/value heads     H  head dimension
    U  user moves (VQ, DQ)           A  assistant moves (DA, CQ, AQ)     2  players (LLM, user)

Everything is right-padded; masks come from lengths, never from `token != pad`, because pad is often
the end-of-sequence token. A prompt is stored once per group, not once per sample.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any


@flax.struct.dataclass
class PromptBatch:
    """Tokenised prompts.

    tokens [P, S] int32, right-padded; length [P] int32; id [P] int32, the row of the source dataset.
    """

    tokens: Array
    length: Array
    id: Array


@flax.struct.dataclass
class Rollout:
    """What the policy wrote for a batch of prompts.

    prompt [P, S] int32; prompt_length [P] int32.
    completion [P, G, N] int32, right-padded, the end token included when it was sampled.
    length [P, G] int32, completion tokens; finished [P, G] bool, False when the budget ran out first.
    sampler_logp [P, G, N] float32, log-probability of each token under the distribution it was drawn
    from; zero outside the mask.
    action_mask [P, G, N] bool, True where the policy chose the token (spliced or tool text is False).
    """

    prompt: Array
    prompt_length: Array
    completion: Array
    length: Array
    finished: Array
    sampler_logp: Array
    action_mask: Array


@flax.struct.dataclass
class Features:
    """Numbers read from completions on the host: the input of every reward function.

    All [B]. valid: the sample takes part in training (its verdict was obtained). format_ok: the four
    blocks are in order. answer_user, answer_llm: answer scores Q_u, Q_l in [0, 1]. payoff
    [B, U, A, 2] float32 and payoff_ok: the parsed matrix (zeros where it is not usable). frontier:
    P in {0, 0.5, 1}, consistency of <analyze> with the matrix's own frontier. reasoning_chars,
    response_words, total_words: counts, float32. source [B] int32, index of the task. analyze_ok: whether
    <analyze> stands once, or None where it is not known. The baseline without the chain (plain answers) has
    payoff_ok for any response, with format_ok, payoff and frontier at zero.
    """

    valid: Array
    format_ok: Array
    answer_user: Array
    answer_llm: Array
    payoff: Array
    payoff_ok: Array
    frontier: Array
    reasoning_chars: Array
    response_words: Array
    total_words: Array
    source: Array
    analyze_ok: Array | None = None


@flax.struct.dataclass
class Reward:
    """user, llm, welfare [B] float32, and the named terms they were summed from (dict of [B])."""

    user: Array
    llm: Array
    welfare: Array
    parts: dict[str, Array]


@flax.struct.dataclass
class Packing:
    """Where the completions of a group stand when they share rows: R rows of W slots instead of G of N.

    start [P, G] int32: the slot of a completion's first token among the R*W of its prompt; no completion
    crosses the end of a row. shape: (R, W), known when a program is compiled.
    """

    start: Array
    shape: tuple[int, int] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Experience:
    """One rollout, scored: what the update step sees.

    prompt [P, S], prompt_length [P], completion [P, G, N], length [P, G], action_mask [P, G, N] as in
    `Rollout`. old_logp, advantage [P, G, N] float32. ref_logp (no KL term), returns and old_value
    (no critic), is_weight (no rollout/trainer correction), sampler_logp (not compared with the trainer's)
    [P, G, N] float32 or None. limit: where each token was chosen, a pytree of [P, G, N] int32, when not all
    tokens were open there (`rl.logprobs.Limit`). packing: rows that the models are to read instead of the
    padded ones; everything else stays [P, G, N].
    """

    prompt: Array
    prompt_length: Array
    completion: Array
    length: Array
    action_mask: Array
    old_logp: Array
    advantage: Array
    ref_logp: Array | None = None
    returns: Array | None = None
    old_value: Array | None = None
    is_weight: Array | None = None
    sampler_logp: Array | None = None
    limit: PyTree | None = None
    packing: Packing | None = None


@flax.struct.dataclass
class Ratio:
    """A mean that is not divided yet, so that micro-batches and hosts add up exactly."""

    total: Array
    count: Array

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Array:
        """total / count, zero when nothing was counted."""
        return self.total / jnp.maximum(self.count, 1e-30) * (self.count > 0)


@flax.struct.dataclass
class Learner:
    """Parameters and their optimizer state."""

    params: PyTree
    opt_state: PyTree


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on, to the bit.

    policy; critic (None without a value model); step [] int32; rng: a typed key. The reference policy
    lives outside: it is never donated and never changes.
    """

    policy: Learner
    critic: Learner | None
    step: Array
    rng: Array
