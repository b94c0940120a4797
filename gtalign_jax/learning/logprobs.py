"""Log-probabilities of given tokens: the only place where predictions meet the tokens they predict.

The model's states are computed here and laid out by the device that holds them; the pass over the vocabulary
is `vocabulary`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gtalign_jax.learning import vocabulary
from gtalign_jax.learning.vocabulary import PLAIN, Given, Head, TokenLoss
from gtalign_jax.mesh.sharding import constrain, pieces
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.transformer import Segments, forward, forward_shared
from gtalign_jax.types import Array, PromptBatch, PyTree


class Objective(NamedTuple):
    """What tokens add to a loss: loss(logprobs, entropies, columns), see `vocabulary.losses`.

    columns: a pytree of arrays laid out as the tokens; where all of them are zero the loss must be zero.
    """

    loss: TokenLoss
    columns: PyTree


class TokenScores(NamedTuple):
    """logprobs and entropies of tokens [P, G, N] (packed rows: [B, T - 1]) float32.

    total []: the sum of an `Objective`'s loss, which then alone has a gradient; else None.
    """

    logp: Array
    entropy: Array
    total: Array | None = None


def token_logprobs(
    params: PyTree,
    config: ModelConfig,
    prompts: PromptBatch,
    completion: Array,
    head: Head = PLAIN,
    at: PyTree | None = None,
    segments: Segments | None = None,
) -> tuple[Array, Array]:
    """(logprobs, entropies) [P, G, N] float32 of completion [P, G, N] after prompts [P, S].

    Column n is log p(token n | prompt, tokens before n) of softmax(logits / temperature). Columns past a
    row's length are finite and meaningless. head: temperature, chunk and limit; at: the states the limit is
    told. segments: of packed rows, see `transformer.forward_shared`.
    """
    scored = token_scores(params, config, prompts, completion, head, at, segments)
    return scored.logp, scored.entropy


def token_scores(
    params: PyTree,
    config: ModelConfig,
    prompts: PromptBatch,
    completion: Array,
    head: Head = PLAIN,
    at: PyTree | None = None,
    segments: Segments | None = None,
    objective: Objective | None = None,
) -> TokenScores:
    """`token_logprobs`, and the total of an objective, whose gradient needs the logits only once."""
    hidden = forward_shared(params, config, prompts.tokens, prompts.length, completion, segments)
    return _scores(params, config, hidden, completion, head, at, objective)


def row_logprobs(
    params: PyTree,
    config: ModelConfig,
    tokens: Array,
    length: Array,
    head: Head = PLAIN,
) -> Array:
    """log p(token t + 1 | tokens up to t): [B, T - 1] float32 for rows tokens [B, T]."""
    hidden = forward(params, config, tokens, length)[:, None, :-1]
    return _scores(params, config, hidden, tokens[:, None, 1:], head).logp[:, 0]


def packed_scores(
    params: PyTree,
    config: ModelConfig,
    tokens: Array,
    segments: Array,
    positions: Array,
    objective: Objective | None = None,
) -> TokenScores:
    """Scores [B, T - 1] of tokens 1.. of packed rows [B, T]; the objective's columns are [B, T - 1] too.

    Column t is log p(token t + 1 | tokens of its chain up to t); across the border of two chains and in the
    padding it is finite and meaningless. segments, positions: as of `models.transformer.forward`.
    """
    length = jnp.full(len(tokens), tokens.shape[1], jnp.int32)
    hidden = forward(params, config, tokens, length, segment_ids=segments, positions=positions)
    if objective is not None:
        objective = Objective(objective.loss, jax.tree.map(lambda x: x[:, None], objective.columns))
    scored = _scores(params, config, hidden[:, None, :-1], tokens[:, None, 1:], Head(), None, objective)
    return TokenScores(scored.logp[:, 0], scored.entropy[:, 0], scored.total)


def _scores(
    params: PyTree,
    config: ModelConfig,
    hidden: Array,
    tokens: Array,
    head: Head,
    at: PyTree | None = None,
    objective: Objective | None = None,
) -> TokenScores:
    """Scores of tokens [P, G, N] from the states [P, G, N, D] before them."""
    table = params["embedding" if config.tie_embeddings else "unembedding"]
    shape, split = tokens.shape, pieces(("batch", "group", "length"), tokens.shape)
    rows = constrain(_by_device(hidden, split), "shards", "width", "width")
    given, total = Given(_columns(tokens, split), _columns(at, split)), None
    if objective is None:
        logp, entropy = vocabulary.scores(head, table, rows, given)
    else:
        loss, beside = objective.loss, _columns(objective.columns, split)
        total, logp, entropy = vocabulary.losses(head, loss, table, rows, given, beside)
    logp, entropy = (_by_position(x, shape, split) for x in (logp, entropy))
    return TokenScores(logp, entropy, total)


def _columns(tree: PyTree, split: tuple[int, ...]) -> PyTree:
    """Arrays [P, G, N] as [devices, tokens of one], where their devices hold them."""
    return jax.tree.map(lambda x: constrain(_by_device(x, split), "shards", "width"), tree)


def _by_device(x: Array, split: tuple[int, ...]) -> Array:
    """x [P, G, N, ...] as [devices, tokens of one, ...]; split: into how many parts P, G and N are cut."""
    cut = [size for part, dim in zip(split, x.shape, strict=False) for size in (part, dim // part)]
    x = x.reshape(*cut, *x.shape[3:]).transpose(0, 2, 4, 1, 3, 5, *range(6, x.ndim + 3))
    return x.reshape(math.prod(split), -1, *x.shape[6:])


def _by_position(x: Array, shape: tuple[int, ...], split: tuple[int, ...]) -> Array:
    """The inverse of `_by_device` for x [devices, tokens of one]."""
    x = x.reshape(*split, *(dim // part for part, dim in zip(split, shape, strict=True)))
    x = x.transpose(0, 3, 1, 4, 2, 5).reshape(shape)
    return constrain(x, "batch", "group", "length")
