"""A tokenizer, an engine and parameters from a Hugging Face model folder."""

import dataclasses
import json
import pathlib

from jax.sharding import Mesh
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gtalign_jax.errors import UserError
from gtalign_jax.mesh.sharding import shard_tree
from gtalign_jax.models import hf
from gtalign_jax.models.config import RuntimeConfig, read_config
from gtalign_jax.models.transformer import logical_axes
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.types import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class EngineOptions:
    """What an `Engine` is told besides its folder. runtime: how the model is computed."""

    sampling: SamplingConfig = SamplingConfig()
    buckets: BucketConfig = BucketConfig()
    mesh: Mesh | None = None
    compact_every: int = 0
    rows: int = 0
    runtime: RuntimeConfig = RuntimeConfig()


def load_tokenizer(folder: pathlib.Path, chat: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of an HF folder. chat: training needs a chat template and an end token.

    Raises UserError when one of them is missing.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: no usable tokenizer ({reason}); save one with save_pretrained") from error
    if chat and not tokenizer.chat_template:
        raise UserError(f"{folder}: the tokenizer has no chat template; set one and save it again")
    if chat and tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end token; set eos_token and save it again")
    return tokenizer


def folder_engine(
    folder: pathlib.Path, options: EngineOptions = EngineOptions(), *, chat: bool = False
) -> Engine:
    """The engine of an HF folder, without its parameters. chat: as in `load_tokenizer`.

    Raises UserError as `load_engine` does.
    """
    config, tokenizer = read_config(folder, options.runtime), load_tokenizer(folder, chat)
    return Engine(
        tokenizer=tokenizer,
        model_config=config,
        eos_ids=end_tokens(folder, tokenizer.eos_token_id),
        sampling=options.sampling,
        buckets=options.buckets,
        mesh=options.mesh,
        compact_every=options.compact_every,
        rows=options.rows,
    )


def load_engine(model: str, options: EngineOptions = EngineOptions()) -> tuple[Engine, PyTree]:
    """(engine, parameters) of a local folder or hub name.

    Raises UserError when the folder lacks a model, a supported architecture or a tokenizer.
    """
    folder = hf.resolve_folder(model)
    engine = folder_engine(folder, options)
    mesh = options.mesh
    shardings = None if mesh is None else shard_tree(logical_axes(engine.model_config), mesh)
    return engine, hf.load_params(folder, engine.model_config, shardings)


def end_tokens(folder: pathlib.Path, fallback: int | None) -> tuple[int, ...]:
    """The end tokens of a folder: generation_config.json, else config.json, else the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            ids = json.loads(path.read_text()).get("eos_token_id")
            if ids is not None:
                return (ids,) if isinstance(ids, int) else tuple(ids)
    return () if fallback is None else (fallback,)
