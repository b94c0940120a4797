"""Which folders an export may take the place of: those that hold nothing but what exports write."""

import fnmatch
import os
import pathlib

from gtalign_jax.errors import UserError

MODEL = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates",
)
CARD = "README.md"
CARD_MARK = "<!-- a card of gtalign-jax -->"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def foreign(folder: pathlib.Path, names: tuple[str, ...] = MODEL) -> list[str]:
    """Names in a folder, sorted, that no export of this kind writes; [] when there is no such folder."""
    if not folder.is_dir():
        return []
    found = sorted(path.name for path in folder.iterdir())
    others = [name for name in found if not any(fnmatch.fnmatchcase(name, known) for known in names)]
    return [name for name in others if name != CARD or not is_ours(folder / CARD)]


def is_ours(card: pathlib.Path) -> bool:
    """Whether a README.md is a model card that an export wrote."""
    try:
        return CARD_MARK in card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def check_free(folder: pathlib.Path, overwrite: bool, names: tuple[str, ...] = MODEL) -> None:
    """UserError unless the folder is absent, empty or, with `overwrite`, an export of this kind."""
    if not folder.is_dir():
        if folder.exists() or os.path.lexists(folder):
            raise UserError(f"--out={folder}: is no folder; name a new one")
        return
    if not any(folder.iterdir()):
        return
    others = foreign(folder, names)
    if others or not (folder / names[0]).is_file():
        found = others[0] if others else "files"
        raise UserError(f"--out={folder}: holds {found} that no export wrote; name a new folder")
    if not overwrite:
        raise UserError(f"--out={folder}: holds an export; --overwrite replaces it, or name a new folder")


def kept(folder: pathlib.Path) -> list[str]:
    """What stays in a model folder when a new model takes the old one's place: all that is not of a model.

    UserError where there is no model to replace but something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is no folder; name another one for the model")
    others = foreign(folder)
    if others and not ((folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))):
        raise UserError(f"{folder}: holds {others[0]} and no model; name a new folder for the model")
    return others
