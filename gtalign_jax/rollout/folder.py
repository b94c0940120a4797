"""A tokenizer, an engine and parameters from a Hugging Face model folder."""

import dataclasses
import datetime
import pathlib
from typing import Any

from jax.sharding import Mesh
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gtalign_jax.errors import UserError
from gtalign_jax.files import drafts
from gtalign_jax.mesh.sharding import shard_tree
from gtalign_jax.models import hf
from gtalign_jax.models.config import RuntimeConfig, read_config
from gtalign_jax.models.fields import read_fields, token_ids
from gtalign_jax.models.transformer import logical_axes
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.chat import ask_template, check_template, turn_end
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.types import PyTree

# Files that hold a vocabulary, and those beside it that are objects.
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")


@dataclasses.dataclass(frozen=True, eq=False)
class EngineOptions:
    """What an `Engine` is told besides its folder. runtime: how the model is computed; date: see `Engine`."""

    sampling: SamplingConfig = SamplingConfig()
    buckets: BucketConfig = BucketConfig()
    mesh: Mesh | None = None
    compact_every: int = 0
    rows: int = 0
    date: datetime.date | None = None
    runtime: RuntimeConfig = RuntimeConfig()


def load_tokenizer(folder: pathlib.Path, chat: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of an HF folder. chat: training needs a chat template and an end token.

    Raises UserError when one of them is missing, when a file is damaged, and when the template fails.
    """
    _check_files(folder)
    try:
        with drafts.staged(folder) as here:
            tokenizer = AutoTokenizer.from_pretrained(str(here), trust_remote_code=False)
        tokenizer("Hello")
    except Exception as error:  # of any kind: the files are read by several libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{folder}: no usable tokenizer ({reason[:300]}); save one with save_pretrained"
        ) from error
    if chat and not tokenizer.chat_template:
        raise UserError(f"{folder}: the tokenizer has no chat template; set one and save it again")
    if tokenizer.chat_template:
        check_template(tokenizer, str(folder))
    if chat and tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end token; set eos_token and save it again")
    return tokenizer


def _check_files(folder: pathlib.Path) -> None:
    """UserError where a vocabulary is missing, for which transformers would put an empty one, or where a file
    is not what it is named."""
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        raise UserError(
            f"{folder}: no usable tokenizer (tokenizer.json is missing, or a directory); "
            "save one with save_pretrained"
        )
    for name in _OBJECTS:
        read_fields(folder / name)
    template = folder / "chat_template.jinja"
    if template.exists() and not template.is_file():
        raise UserError(f"{template}: is no file")


def folder_engine(
    folder: pathlib.Path, options: EngineOptions = EngineOptions(), *, chat: bool = False
) -> Engine:
    """The engine of an HF folder, without its parameters. chat: as in `load_tokenizer`.

    Raises UserError as `load_engine` does.
    """
    config, tokenizer = read_config(folder, options.runtime), load_tokenizer(folder, chat)
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {last}, and the model {config.vocab_size} "
            "(config.json: vocab_size); they do not belong together, or the embedding must be resized"
        )
    return Engine(
        tokenizer=tokenizer,
        model_config=config,
        eos_ids=end_tokens(folder, tokenizer, config.vocab_size),
        sampling=options.sampling,
        buckets=options.buckets,
        mesh=options.mesh,
        compact_every=options.compact_every,
        rows=options.rows,
        date=options.date,
        template=ask_template(tokenizer),
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


def end_tokens(folder: pathlib.Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[int, ...]:
    """The end tokens of a folder: generation_config.json's, else config.json's, else the tokenizer's.

    The first is the one that ends a turn in the chat template, whether they hold it or not.
    """
    ids: tuple[int, ...] = ()
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        ids = token_ids(read_fields(path), "eos_token_id", str(path), vocab_size) or ids
    end, own = turn_end(tokenizer), tokenizer.eos_token_id
    if not ids and own is not None:
        ids = (own,)
    if end is None and own in ids:
        end = own
    return ids if end is None else (end, *(i for i in ids if i != end))


def generation_fields(
    folder: pathlib.Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> dict[str, Any]:
    """generation_config.json for a model trained from an HF folder: the folder's own, all end tokens in it.

    One is added where the chat template ends turns with another, which is what training taught.
    """
    fields = read_fields(folder / "generation_config.json")
    ends = end_tokens(folder, tokenizer, vocab_size)
    if not fields:
        fields = {"pad_token_id": tokenizer.pad_token_id}
    if set(token_ids(fields, "eos_token_id", str(folder), vocab_size)) != set(ends):
        fields["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    return fields
