"""How a model generates, and what lies between its texts and their tokens.

An `Engine` is a set of choices (tokenizer, shapes, sampling, mesh) and holds no arrays; parameters and
keys are arguments of what it is given to, first of all of `generate.rollout`.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gtalign_jax.chain.grammar import chain_grammar
from gtalign_jax.errors import UserError
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.rollout import chat, grammar
from gtalign_jax.rollout.buckets import BucketConfig, bucket
from gtalign_jax.rollout.grammar import BlockLimits, Constraint
from gtalign_jax.rollout.request import Ending
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.rollout.stop import stop_table
from gtalign_jax.rollout.template import AS_GIVEN, Messages, Template
from gtalign_jax.rollout.token_bytes import token_bytes
from gtalign_jax.types import Completions, PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Messages | Sequence[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """How to generate: everything but the parameters and the key.

    compact_every: live rows are gathered into a smaller batch as soon as they fit into one, at most once in
    so many decode steps (0: never; the whole generation is then one program without a pause). rows: at most
    so many rows are decoded at a time, rounded up to the devices they are spread over; the others of a call
    wait for the place of a row that is done, and batch buckets do not bound the call (0: all at once).
    eos_ids: the tokens that end a completion; the first is the one that ends a turn. date: what a chat
    template that asks for today is told (None: today). template: what the chat template does with messages.
    """

    tokenizer: PreTrainedTokenizerBase
    model_config: ModelConfig
    eos_ids: tuple[int, ...]
    sampling: SamplingConfig = SamplingConfig()
    buckets: BucketConfig = BucketConfig()
    mesh: Mesh | None = None
    compact_every: int = 0
    rows: int = 0
    date: datetime.date | None = None
    template: Template = AS_GIVEN


def encode(engine: Engine, prompt: Prompt) -> list[int]:
    """Token ids of a plain text, or of chat messages through the chat template, ready to be answered; token
    ids stay as they are.

    A tokenizer may begin a text with a token of its own; one that the text begins with is not doubled.
    """
    if isinstance(prompt, str):
        ids, begin = list(engine.tokenizer(prompt)["input_ids"]), engine.tokenizer.bos_token
        doubled = begin and prompt.startswith(begin) and ids[:2] == [engine.tokenizer.bos_token_id] * 2
        return ids[1:] if doubled else ids
    if prompt and isinstance(prompt[0], int):
        return list(cast(Sequence[int], prompt))
    messages = cast(Messages, prompt)
    return chat.encode_all(engine.tokenizer, [messages], engine.date, engine.template)[0]


def decode_tokens(engine: Engine, ids: Iterable[int]) -> str:
    """The text of completion tokens, without the end token; other special tokens stay visible."""
    kept = [int(i) for i in ids]
    if kept and kept[-1] in engine.eos_ids:
        kept = kept[:-1]
    return engine.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def texts(engine: Engine, completions: Completions) -> list[str]:
    """The completions as text, row p*G + g."""
    return [decode_tokens(engine, ids) for ids in completion_ids(completions)]


def completion_ids(completions: Completions) -> list[np.ndarray]:
    """The tokens of row p*G + g without padding, the end token included."""
    tokens, length = jax.device_get((completions.tokens, completions.length))
    rows = tokens.reshape(-1, tokens.shape[-1])
    return [row[:n] for row, n in zip(rows, length.reshape(-1), strict=True)]


def make_ending(engine: Engine, stops: Sequence[str] = ()) -> Ending:
    """End tokens and stop strings as arrays; made once per set of stop strings.

    A character of a stop string that is cut in the middle of its UTF-8 bytes by the tokenizer is not
    recognised; ASCII always is.
    """
    eos = np.asarray(engine.eos_ids, np.int32)
    if not stops:
        return Ending(eos)
    return Ending(eos, stop_table(stops, token_texts(engine)))


def token_texts(engine: Engine) -> list[str]:
    """The text of every token id of the model, "" for ids the tokenizer does not have."""
    known, vocab = set(engine.tokenizer.get_vocab().values()), engine.model_config.vocab_size
    return [engine.tokenizer.decode([i]) if i in known else "" for i in range(vocab)]


def make_constraint(engine: Engine, limits: BlockLimits | None = None) -> Constraint:
    """The tables that hold decoding to the chain's grammar; made once per tokenizer, in a second or less.

    UserError when the tokenizer is of an unknown kind, lacks the characters, or has no end token.
    """
    vocab = engine.model_config.vocab_size
    tables = grammar.compile_constraint(
        chain_grammar(), token_bytes(engine.tokenizer, vocab), engine.eos_ids, limits
    )
    everywhere = None if engine.mesh is None else NamedSharding(engine.mesh, PartitionSpec())
    return jax.device_put(tables, everywhere)


def fits(engine: Engine, ids: Sequence[int]) -> bool:
    """Whether a prompt of these tokens has a bucket; the caller counts those it drops."""
    return 0 < len(ids) <= engine.buckets.prompt[-1]


def prompt_slots(engine: Engine, ids: Sequence[int]) -> int:
    """The bucket of a prompt; UserError when there is none."""
    return bucket(len(ids), engine.buckets.prompt, "prompt", "a prompt")


def prompt_batch(engine: Engine, prompts: Sequence[Sequence[int]]) -> PromptBatch:
    """Token lists as host arrays [P, S], S the bucket of the longest; UserError for one that has none."""
    length = np.fromiter(map(len, prompts), np.int32, len(prompts))
    for i in np.flatnonzero((length == 0) | (length > engine.buckets.prompt[-1])):
        if not length[i]:
            raise UserError(f"prompt {i} has no tokens; a prompt needs at least one")
        bucket(int(length[i]), engine.buckets.prompt, "prompt", f"prompt {i}")
    slots = bucket(int(length.max()), engine.buckets.prompt, "prompt", "the longest prompt")
    tokens = np.zeros((len(prompts), slots), np.int32)
    tokens[np.arange(slots) < length[:, None]] = np.fromiter(itertools.chain.from_iterable(prompts), np.int32)
    return PromptBatch(tokens=tokens, length=length)
