"""An engine and parameters from a Hugging Face model folder."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from jax.sharding import Mesh
from transformers import AutoTokenizer

from gtalign_jax.errors import UserError
from gtalign_jax.models import hf
from gtalign_jax.models.config import read_config
from gtalign_jax.models.transformer import logical_axes
from gtalign_jax.rollout.engine import BucketConfig, Engine
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.sharding import shard_tree
from gtalign_jax.types import PyTree


def load_engine(
    model: str,
    *,
    sampling: SamplingConfig | None = None,
    buckets: BucketConfig | None = None,
    mesh: Mesh | None = None,
    **switches: Any,
) -> tuple[Engine, PyTree]:
    """(engine, parameters) of a local folder or hub name.

    switches: run-time fields of ModelConfig such as compute_dtype. Raises UserError when the folder
    lacks a model, a supported architecture or a tokenizer.
    """
    folder = hf.resolve_folder(model)
    config = read_config(folder, **switches)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: no usable tokenizer ({reason}); save one with save_pretrained") from error
    shardings = None if mesh is None else shard_tree(logical_axes(config), mesh)
    params = hf.load_params(folder, config, shardings)
    eos_ids = end_tokens(folder, tokenizer.eos_token_id)
    engine = Engine(tokenizer, config, eos_ids, sampling or SamplingConfig(), buckets or BucketConfig(), mesh)
    return engine, params


def end_tokens(folder: pathlib.Path, fallback: int | None) -> tuple[int, ...]:
    """The end tokens of a folder: generation_config.json, else config.json, else the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            ids = json.loads(path.read_text()).get("eos_token_id")
            if ids is not None:
                return (ids,) if isinstance(ids, int) else tuple(ids)
    return () if fallback is None else (fallback,)
