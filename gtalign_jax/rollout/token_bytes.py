"""What each token of a tokenizer adds to the text, as bytes.

A token may hold a part of a character only, so its own decoded text says nothing about it ("\\ufffd").
Here the bytes come from the vocabulary and the tokenizer's decoder: the bytes of a row are those of its
tokens, joined, and its text is their UTF-8 decoding.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from gtalign_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[bytes | None]:
    """The bytes of ids 0 .. vocab_size - 1; None for special tokens and ids the tokenizer lacks.

    Knows byte-level tokenizers (Qwen, Llama 3, GPT-2) and those with byte fallback (Llama 2, Gemma).
    UserError for any other kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kinds = _decoder_kinds(json.loads(backend.to_str())["decoder"]) if backend is not None else set()
    if "ByteLevel" in kinds:
        convert = _byte_level
    elif "ByteFallback" in kinds:
        convert = _byte_fallback
    else:
        raise UserError(
            f"tokenizer: its decoder ({', '.join(sorted(kinds)) or 'none'}) is neither byte-level nor with "
            "byte fallback, so decoding cannot be constrained; switch the constraint off"
        )
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found: list[bytes | None] = [None] * vocab_size
    for text, i in tokenizer.get_vocab().items():
        if i < vocab_size and i not in special:
            found[i] = convert(text)
    return found


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    kinds = {decoder["type"]}
    return kinds.union(*(_decoder_kinds(part) for part in decoder.get("decoders", ())))


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 stands for itself, the other bytes are numbered from U+0100 on.
    """
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_characters()


def _byte_level(text: str) -> bytes:
    # An added token with a character outside the table (a plain space) stands for itself.
    if all(c in _BYTES for c in text):
        return bytes(_BYTES[c] for c in text)
    return text.encode()


def _byte_fallback(text: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(text):
        return bytes([int(match.group(1), 16)])
    return text.replace(_SPACE, " ").encode()
