"""Text in, rollouts out: the host side of generation.

An `Engine` is a set of choices (tokenizer, shapes, sampling, mesh) and holds no arrays; parameters and
keys are arguments. Ragged prompts are padded into a few fixed shapes, so that a handful of programs is
compiled once; `programs.compiled_programs()` counts them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jinja2
import numpy as np
from jax.sharding import Mesh

from gtalign_jax.errors import UserError
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.rollout import compaction, programs
from gtalign_jax.rollout.decode import DecodeState, Ending, Forced
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.rollout.stop import stop_table
from gtalign_jax.sharding import batch_shards, place_batch
from gtalign_jax.types import Array, PromptBatch, PyTree, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class BucketConfig:
    """The shapes programs are compiled for, each increasing.

    prompt: prompt slots S. completion: completion slots N. batch: numbers of prompts P in a batch; a
    batch between two of them is padded with empty prompts, and () takes every batch as it comes.
    """

    prompt: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    completion: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    batch: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            sizes = getattr(self, field.name)
            if list(sizes) != sorted({int(size) for size in sizes if size > 0}):
                raise UserError(f"buckets.{field.name}={sizes}: give positive sizes, increasing")
            if not sizes and field.name != "batch":
                raise UserError(f"buckets.{field.name} is empty: give at least one size")


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """How to generate: everything but the parameters and the key.

    compact_every: decode steps between two looks at which rows are done, to gather the live ones into a
    smaller batch (0: never; the whole generation is then one program without a pause).
    """

    tokenizer: PreTrainedTokenizerBase
    model_config: ModelConfig
    eos_ids: tuple[int, ...]
    sampling: SamplingConfig = SamplingConfig()
    buckets: BucketConfig = BucketConfig()
    mesh: Mesh | None = None
    compact_every: int = 0


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
    vocab = engine.model_config.vocab_size
    known = len(engine.tokenizer)
    token_texts = [engine.tokenizer.decode([i]) if i < known else "" for i in range(vocab)]
    return Ending(eos, stop_table(stops, token_texts))


# --- buckets ------------------------------------------------------------------------------------


def bucket(size: int, sizes: Sequence[int], field: str, what: str) -> int:
    """The smallest bucket that holds `size`; UserError names the field when there is none."""
    for candidate in sizes:
        if size <= candidate:
            return candidate
    raise UserError(f"{what} needs {size} slots, over the largest of buckets.{field}={sizes}; add a size")


def fits(engine: Engine, ids: Sequence[int]) -> bool:
    """Whether a prompt of these tokens has a bucket; the caller counts those it drops."""
    return 0 < len(ids) <= engine.buckets.prompt[-1]


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


def _place(engine: Engine, prompts: PromptBatch) -> PromptBatch:
    """Pad to (batch bucket, prompt bucket) and put on the devices, prompts spread over the mesh."""
    count, slots = prompts.tokens.shape
    rows = count
    if engine.buckets.batch:
        rows = bucket(count, engine.buckets.batch, "batch", "the batch")
    rows += -rows % _shards(engine)
    width = bucket(slots, engine.buckets.prompt, "prompt", "the longest prompt")
    if (rows, width) != (count, slots):
        prompts = jax.device_get(prompts)
        extra = (0, rows - count)
        prompts = PromptBatch(
            tokens=np.pad(prompts.tokens, (extra, (0, width - slots))),
            length=np.pad(prompts.length, extra),
            id=np.pad(prompts.id, extra, constant_values=-1),
        )
    # A copy: the decode state takes these buffers over and gives them up when it is resumed.
    prompts = jax.tree.map(np.array, jax.device_get(prompts))
    return jax.device_put(prompts) if engine.mesh is None else place_batch(prompts, engine.mesh)


def _shards(engine: Engine) -> int:
    """Over how many devices the prompts of a batch are spread."""
    return 1 if engine.mesh is None else batch_shards(engine.mesh)


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
    first_row: int = 0,
) -> Rollout:
    """group_size completions of each prompt, as `decode.generate`, in bucketed shapes.

    The completion axis of the result is the bucket of max_new_tokens; no row is longer than
    max_new_tokens itself. first_row: number of the first prompt in the whole step, when this batch is
    a part of it, so that the parts draw what the whole would.
    """
    batch = _place(engine, prompts)
    ending = make_ending(engine) if ending is None else ending
    slots = _completion_slots(engine, max_new_tokens)
    result = _run(engine, params, batch, key, group_size, slots, max_new_tokens, ending, first_row)
    return _trim(result, prompts.tokens.shape[0])


def warm_up(
    engine: Engine, params: PyTree, group_size: int, max_new_tokens: int, *, ending: Ending | None = None
) -> None:
    """Compile all that `rollout` will run for this group size and budget, in every bucket of prompts."""
    ending = make_ending(engine) if ending is None else ending
    slots = _completion_slots(engine, max_new_tokens)
    for rows in engine.buckets.batch or (1,):
        for width in engine.buckets.prompt:
            batch = _place(engine, prompt_batch(engine, [[0] * width] * rows))
            _run(engine, params, batch, jax.random.key(0), group_size, slots, 0, ending, 0)


def _run(
    engine: Engine,
    params: PyTree,
    batch: PromptBatch,
    key: Array,
    group_size: int,
    slots: int,
    until: int,
    ending: Ending,
    first_row: int,
) -> Rollout:
    """Generate for a placed batch; with until = 0 only compile (and decide the first token)."""
    model = (params, engine.model_config)
    row = first_row + np.arange(batch.tokens.shape[0], dtype=np.int32)
    shapes = {"group_size": group_size, "max_new_tokens": slots}
    with _on_mesh(engine):
        if not engine.compact_every:
            return programs.generate(
                *model, batch, key, engine.sampling, ending=ending, row=row, until=np.int32(until), **shapes
            )
        state = programs.start(*model, batch, key, engine.sampling, ending=ending, row=row, **shapes)
        sizes = compaction.batch_sizes(row.size * group_size, _shards(engine))
        if until == 0:
            compaction.warm_up(*model, state, engine.sampling, ending=ending, sizes=sizes)
        return compaction.finish(
            *model,
            state,
            engine.sampling,
            ending=ending,
            until=until,
            every=engine.compact_every,
            sizes=sizes,
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
) -> DecodeState:
    """Generate until every row ended, and return the state, which `resume` can go on from."""
    model = (params, engine.model_config)
    batch = _place(engine, prompts)
    shapes = {"group_size": group_size, "max_new_tokens": _completion_slots(engine, max_new_tokens)}
    until = np.int32(max_new_tokens)
    with _on_mesh(engine):
        state = programs.start(*model, batch, key, engine.sampling, ending=ending, **shapes)
        return programs.advance(*model, state, engine.sampling, ending=ending, until=until)


def resume(
    engine: Engine,
    params: PyTree,
    state: DecodeState,
    forced: Forced,
    keep: int,
    max_new_tokens: int,
    *,
    ending: Ending,
) -> DecodeState:
    """Keep the first `keep` tokens of every row with their cache, write the forced ones, generate on.

    The state is consumed. forced: [P, G, N] tokens from position 0 on (those before `keep` are the
    row's own), and how many of them to write.
    """
    with _on_mesh(engine):
        return programs.advance(
            params,
            engine.model_config,
            programs.rewind(state, np.int32(keep)),
            engine.sampling,
            until=np.int32(max_new_tokens),
            ending=ending,
            forced=forced,
        )


def _completion_slots(engine: Engine, max_new_tokens: int) -> int:
    return bucket(max_new_tokens, engine.buckets.completion, "completion", "max_new_tokens")


def _on_mesh(engine: Engine) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if engine.mesh is None else jax.set_mesh(engine.mesh)


def _trim(result: Rollout, count: int) -> Rollout:
    """Without the padding prompts; on the host when there were any."""
    if result.prompt.shape[0] == count:
        return result
    return jax.tree.map(lambda x: x[:count], jax.device_get(result))
