"""Text in, rollouts out: the host side of generation.

An `Engine` is a set of choices (tokenizer, shapes, sampling, mesh) and holds no arrays; parameters and
keys are arguments. Ragged prompts are padded into a few fixed shapes, so that a handful of programs is
compiled once; `programs.compiled_programs()` counts them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jinja2
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gtalign_jax.chain.grammar import chain_grammar
from gtalign_jax.errors import UserError
from gtalign_jax.mesh import processes
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.rollout import compaction, grammar, placing, programs, refill
from gtalign_jax.rollout.buckets import BucketConfig, bucket
from gtalign_jax.rollout.decode import DecodeState, Ending, Forced
from gtalign_jax.rollout.grammar import BlockLimits, Constraint
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.rollout.stop import stop_table
from gtalign_jax.rollout.token_bytes import token_bytes
from gtalign_jax.types import Array, PromptBatch, PyTree, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """How to generate: everything but the parameters and the key.

    compact_every: live rows are gathered into a smaller batch as soon as they fit into one, at most once in
    so many decode steps (0: never; the whole generation is then one program without a pause). rows: at most
    so many rows are decoded at a time, rounded up to the devices they are spread over; the others of a call
    wait for the place of a row that is done, and batch buckets do not bound the call (0: all at once).
    """

    tokenizer: PreTrainedTokenizerBase
    model_config: ModelConfig
    eos_ids: tuple[int, ...]
    sampling: SamplingConfig = SamplingConfig()
    buckets: BucketConfig = BucketConfig()
    mesh: Mesh | None = None
    compact_every: int = 0
    rows: int = 0


# --- text and tokens ----------------------------------------------------------------------------


def encode(engine: Engine, prompt: str | Messages) -> list[int]:
    """Token ids of a plain text, or of chat messages through the chat template, ready to be answered."""
    if isinstance(prompt, str):
        return list(engine.tokenizer(prompt)["input_ids"])
    if not engine.tokenizer.chat_template:
        raise UserError("the model's tokenizer has no chat template; give plain text or token ids instead")
    try:
        text = engine.tokenizer.apply_chat_template(
            [dict(message) for message in prompt], tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses these messages ({error})") from error
    return list(engine.tokenizer(text, add_special_tokens=False)["input_ids"])


def decode_tokens(engine: Engine, ids: Sequence[int]) -> str:
    """The text of completion tokens, without the end token; other special tokens stay visible."""
    ids = [int(i) for i in ids]
    if ids and ids[-1] in engine.eos_ids:
        ids = ids[:-1]
    return engine.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def texts(engine: Engine, rollout: Rollout) -> list[str]:
    """The completions as text, row p*G + g."""
    return [decode_tokens(engine, ids) for ids in completion_ids(rollout)]


def completion_ids(rollout: Rollout) -> list[np.ndarray]:
    """The completion tokens of row p*G + g without padding, the end token included."""
    tokens, length = jax.device_get((rollout.completion, rollout.length))
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
    known, vocab = len(engine.tokenizer), engine.model_config.vocab_size
    return [engine.tokenizer.decode([i]) if i < known else "" for i in range(vocab)]


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


# --- buckets ------------------------------------------------------------------------------------


def fits(engine: Engine, ids: Sequence[int]) -> bool:
    """Whether a prompt of these tokens has a bucket; the caller counts those it drops."""
    return 0 < len(ids) <= engine.buckets.prompt[-1]


def prompt_slots(engine: Engine, ids: Sequence[int]) -> int:
    """The bucket of a prompt; UserError when there is none."""
    return bucket(len(ids), engine.buckets.prompt, "prompt", "a prompt")


def prompt_batch(
    engine: Engine, prompts: Sequence[Sequence[int]], ids: Sequence[int] | None = None
) -> PromptBatch:
    """Token lists as host arrays [P, S], S the bucket of the longest. ids [P]: default 0..P-1."""
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {i} has no tokens; a prompt needs at least one")
        bucket(len(prompt), engine.buckets.prompt, "prompt", f"prompt {i}")
    longest = max(len(prompt) for prompt in prompts)
    slots = bucket(longest, engine.buckets.prompt, "prompt", "the longest prompt")
    tokens = np.zeros((len(prompts), slots), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    length = np.asarray([len(prompt) for prompt in prompts], np.int32)
    ids = np.arange(len(prompts)) if ids is None else np.asarray(ids)
    return PromptBatch(tokens=tokens, length=length, id=ids.astype(np.int32))


# --- generation ----------------------------------------------------------------------------------


def rollout(
    engine: Engine,
    params: PyTree,
    prompts: PromptBatch,
    key: Array,
    group_size: int,
    max_new_tokens: int,
    *,
    ending: Ending | None = None,
    constraint: Constraint | None = None,
    first_row: int = 0,
    seeds: np.ndarray | None = None,
) -> Rollout:
    """group_size completions of each prompt, as `decode.generate`, in bucketed shapes.

    The completion axis of the result is the bucket of max_new_tokens; no row is longer than
    max_new_tokens itself. constraint: from `make_constraint`; every row is then a whole chain within
    max_new_tokens. first_row: number of the first prompt in the whole step, when this batch is a part of
    it, so that the parts draw what the whole would. seeds [P, G] int32: a seed for each sample instead of
    its number; what a sample draws then depends on the key, its prompt and its seed alone.
    """
    count = prompts.tokens.shape[0]
    row = first_row + np.arange(count, dtype=np.int32)
    if seeds is not None:
        if np.shape(seeds) != (count, group_size):
            raise UserError(f"seeds: shape {np.shape(seeds)}, needs {(count, group_size)}, one a sample")
        row = np.asarray(seeds, np.int32)
    options = _options(engine, ending, constraint, max_new_tokens)
    if refill.waits(engine, count, group_size):
        return refill.rollout(engine, params, prompts, key, row, group_size, max_new_tokens, options)
    batch = placing.place(engine, prompts, placing.padded(engine, count))
    row = placing.pad_rows(row, batch.tokens.shape[0])
    result = _run(engine, params, batch, key, row, group_size, max_new_tokens, options)
    return _trim(result, count)


def warm_up(
    engine: Engine,
    params: PyTree,
    group_size: int,
    max_new_tokens: int,
    *,
    ending: Ending | None = None,
    constraint: Constraint | None = None,
) -> None:
    """Compile all that `rollout` will run for this group size and budget, in every bucket of prompts."""
    options = _options(engine, ending, constraint, max_new_tokens)
    key, rest = jax.random.key(0), (group_size, max_new_tokens, options)
    counts = engine.buckets.batch or (1,)
    waits = [refill.waits(engine, count, group_size) for count in counts]
    for width in engine.buckets.prompt:
        one = prompt_batch(engine, [[0] * width])
        for count, queued in zip(counts, waits, strict=True):
            if not queued:
                batch = placing.place(engine, one, placing.padded(engine, count))
                row = np.arange(batch.tokens.shape[0], dtype=np.int32)
                _run(engine, params, batch, key, row, *rest, compile_only=True)
        if any(waits) or (engine.rows and not engine.buckets.batch):
            refill.warm_up(engine, params, one, key, *rest)


def _run(
    engine: Engine,
    params: PyTree,
    batch: PromptBatch,
    key: Array,
    row: np.ndarray,
    group_size: int,
    max_new_tokens: int,
    options: dict[str, Any],
    compile_only: bool = False,
) -> Rollout:
    """Generate for a placed batch; compile_only decides the first token and no more."""
    model = (params, engine.model_config)
    until = 0 if compile_only else max_new_tokens
    shapes = {"group_size": group_size, "max_new_tokens": placing.completion_slots(engine, max_new_tokens)}
    with placing.on_mesh(engine):
        if not engine.compact_every:
            return programs.generate(
                *model, batch, key, engine.sampling, row=row, until=np.int32(until), **shapes, **options
            )
        state = programs.start(*model, batch, key, engine.sampling, row=row, **shapes, **options)
        sizes = compaction.batch_sizes(batch.tokens.shape[0] * group_size, placing.shards(engine))
        if compile_only:
            state = compaction.warm_up(*model, state, engine.sampling, sizes=sizes, **options)
        return compaction.finish(
            *model, state, engine.sampling, until=until, every=engine.compact_every, sizes=sizes, **options
        )


def begin(
    engine: Engine,
    params: PyTree,
    prompts: PromptBatch,
    key: Array,
    group_size: int,
    max_new_tokens: int,
    *,
    ending: Ending,
    constraint: Constraint | None = None,
) -> DecodeState:
    """Generate until every row ended, and return the state, which `resume` can go on from."""
    model = (params, engine.model_config)
    batch = placing.place(engine, prompts, placing.padded(engine, prompts.tokens.shape[0]))
    shapes = {"group_size": group_size, "max_new_tokens": placing.completion_slots(engine, max_new_tokens)}
    options = _options(engine, ending, constraint, max_new_tokens)
    with placing.on_mesh(engine):
        state = programs.start(*model, batch, key, engine.sampling, **shapes, **options)
        return programs.advance(*model, state, engine.sampling, until=np.int32(max_new_tokens), **options)


def resume(
    engine: Engine,
    params: PyTree,
    state: DecodeState,
    forced: Forced,
    keep: int,
    max_new_tokens: int,
    *,
    ending: Ending,
    constraint: Constraint | None = None,
) -> DecodeState:
    """Keep the first `keep` tokens of every row with their cache, write the forced ones, generate on.

    The state is consumed. forced: [P, G, N] tokens from position 0 on (those before `keep` are the
    row's own), and how many of them to write. constraint: the one of `begin`, or None in both.
    """
    options = _options(engine, ending, constraint, max_new_tokens)
    with placing.on_mesh(engine):
        return programs.advance(
            params,
            engine.model_config,
            programs.rewind(state, np.int32(keep), options["constraint"]),
            engine.sampling,
            until=np.int32(max_new_tokens),
            forced=forced,
            **options,
        )


def _options(
    engine: Engine, ending: Ending | None, constraint: Constraint | None, max_new_tokens: int
) -> dict[str, Any]:
    """The arrays that generation is held to, the constraint within this budget."""
    if constraint is not None:
        least = grammar.shortest(constraint)
        if max_new_tokens < least:
            raise UserError(f"max_new_tokens={max_new_tokens}: the shortest chain takes {least}; raise it")
        constraint = constraint._replace(budget=np.int32(max_new_tokens))
    return {"ending": make_ending(engine) if ending is None else ending, "constraint": constraint}


def _trim(result: Rollout, count: int) -> Rollout:
    """Without the padding prompts; on the host when there were any."""
    if jax.process_count() > 1:
        result = processes.fetch(result)  # every host judges a part of it, and all train on it
    if result.prompt.shape[0] == count:
        return result
    return jax.tree.map(lambda x: x[:count], jax.device_get(result))
