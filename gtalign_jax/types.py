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

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp

# A `jax.Array`, a host's `np.ndarray`, a tracer or a `ShapeDtypeStruct`: the same functions take them all.
# What an array holds is said by docstrings.
Array = Any
PyTree = Any

# (states [...], logits [..., V]) → logits far below all others, and finite, of tokens left out.
LimitLogits = Callable[[PyTree, Array], Array]


class PromptBatch(flax.struct.PyTreeNode):
    """Tokenised prompts: tokens [P, S] int32, right-padded; length [P] int32."""

    tokens: Array
    length: Array


class Completions(flax.struct.PyTreeNode):
    """What was written for a batch of prompts.

    tokens [P, G, N] int32, right-padded, the end token included when it was sampled.
    length [P, G] int32; finished [P, G] bool, False when the budget ran out first.
    logp [P, G, N] float32, log-probability of each token under the distribution it was drawn from; zero
    outside the mask.
    action_mask [P, G, N] bool, True where the policy chose the token (spliced or tool text is False).
    """

    tokens: Array
    length: Array
    finished: Array
    logp: Array
    action_mask: Array


class Rollout(flax.struct.PyTreeNode):
    """P prompts and the G completions of each."""

    prompts: PromptBatch
    completions: Completions


class Limit(NamedTuple):
    """What tokens were drawn from when not all were open: a grammar, or top-k and the like.

    states: Completions → a pytree of [P, G, N] integers, where each token was chosen. logits: (states [...],
    logits [..., V]) → logits far below all others, and finite, where a token was not open.
    """

    states: Callable[[Completions], PyTree]
    logits: LimitLogits


class Features(flax.struct.PyTreeNode):
    """Numbers read from completions on the host: the input of every reward function.

    All [B]. valid: the sample takes part in training (its verdict was obtained). format_ok: the four
    blocks are in order. answer_user, answer_llm: answer scores Q_u, Q_l in [0, 1]. payoff
    [B, U, A, 2] float32 and payoff_ok: the parsed matrix (zeros where it is not usable). frontier:
    P in {0, 0.5, 1}, consistency of <analyze> with the matrix's own frontier. reasoning_chars,
    response_words, total_words: counts, float32. source [B] int32, index of the task in
    `config.data.tasks`. analyze_ok: whether
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


class Reward(flax.struct.PyTreeNode):
    """user, llm, welfare [B] float32, and the named terms they were summed from (dict of [B])."""

    user: Array
    llm: Array
    welfare: Array
    parts: dict[str, Array]


class Batch(flax.struct.PyTreeNode):
    """A scored rollout.

    reward [P, G] float32; valid [P, G] bool: the reward is known. components [C, P, G] float32: the parts of
    the reward that gdpo normalises one by one. untrained [P, G, N] bool: tokens without advantage, which the
    KL to the reference holds in place. response [P, G, N] bool: tokens of the response, None where all are.
    """

    rollout: Rollout
    reward: Array
    valid: Array
    components: Array | None = None
    untrained: Array | None = None
    response: Array | None = None


class Models(flax.struct.PyTreeNode):
    """The parameters that say something of a batch before the update.

    base: what policy, reference and critic stand on when those are adapters (`models.lora`).
    """

    policy: PyTree
    reference: PyTree | None = None
    critic: PyTree | None = None
    base: PyTree | None = None


class Packing(flax.struct.PyTreeNode):
    """Where the completions of a group stand when they share rows: R rows of W slots instead of G of N.

    start [P, G] int32: the slot of a completion's first token among the R*W of its prompt; no completion
    crosses the end of a row. shape: (R, W), known when a program is compiled.
    """

    start: Array
    shape: tuple[int, int] = flax.struct.field(pytree_node=False)


class Experience(flax.struct.PyTreeNode):
    """One rollout, scored: what the update step sees.

    completions: as in `Rollout`, but for action_mask: the tokens that are trained on. old_logp, advantage
    [P, G, N] float32. ref_logp (no KL term), returns and old_value (no critic), is_weight (no
    rollout/trainer correction) [P, G, N] float32 or None. limit: where each token was chosen, a pytree of
    [P, G, N] int32, when not all tokens were open there (`Limit`). fluency [P, G]: log-probability of each
    response under the reference, and its tokens. packing: rows that the models are to
    read instead of the padded ones; everything else stays [P, G, N].
    """

    prompts: PromptBatch
    completions: Completions
    old_logp: Array
    advantage: Array
    ref_logp: Array | None = None
    returns: Array | None = None
    old_value: Array | None = None
    is_weight: Array | None = None
    limit: PyTree | None = None
    fluency: Ratio | None = None
    packing: Packing | None = None


class Ratio(flax.struct.PyTreeNode):
    """A mean that is not divided yet, so that micro-batches and hosts add up exactly."""

    total: Array
    count: Array

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Array:
        """total / count, zero when nothing was counted."""
        return self.total / jnp.maximum(self.count, 1e-30) * (self.count > 0)


class ModelState(flax.struct.PyTreeNode):
    """Parameters and their optimizer state."""

    params: PyTree
    opt_state: PyTree


class TrainState(flax.struct.PyTreeNode):
    """Everything a run needs to go on, to the bit.

    policy; critic (None without a value model); step [] int32; rng: a typed key. The reference policy
    lives outside: it is never donated and never changes, unless the algorithm refreshes it: then it is
    `reference`. kl_coef [] float32: what an adaptive KL controller has reached. waiting: completions that
    were written ahead of the next step, by parameters that are gone.
    """

    policy: ModelState
    critic: ModelState | None
    step: Array
    rng: Array
    kl_coef: Array | None = None
    reference: PyTree | None = None
    waiting: Completions | None = None
