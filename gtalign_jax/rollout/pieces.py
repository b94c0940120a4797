"""Texts tokenised in pieces: what stands in many of them, such as an instruction, is tokenised once.

A tokenizer first cuts a text at its special tokens, and does all else to each piece as if it were a text
alone. So the ids of a text are those of its pieces, one after the other, where three things hold, and else it
is tokenised whole: nothing that the tokenizer does depends on where a piece stands (`_KINDS`); a special
token takes none of the spaces around it; and it is found wherever it stands, as no other added token can
overlap it.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Normalizers and pre-tokenizers that see a piece alone; Metaspace may ask whether it is the first of a text.
_KINDS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Replace", "Prepend"),
    *("BertNormalizer", "Precompiled", "ByteLevel", "Split", "Digits", "Punctuation", "Whitespace"),
    *("WhitespaceSplit", "BertPreTokenizer", "Metaspace", "Sequence"),
}


def find_cuts(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The special tokens, with their ids, at which `encode` may cut texts; none where it must not."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.split_special_tokens:
        return {}
    backend, added = tokenizer.backend_tokenizer, tokenizer.added_tokens_decoder
    if backend.truncation or backend.padding or backend.encode_special_tokens:
        return {}
    if not all(map(_sees_a_piece_alone, (backend.normalizer, backend.pre_tokenizer))):
        return {}
    if any(token.single_word for token in added.values()):  # such a one looks at the letters beside it
        return {}
    texts = [token.content for token in added.values()]
    inside = {character for text in texts for character in text[1:]}
    return {
        token.content: number
        for number, token in added.items()
        if token.special
        and not (token.normalized or token.lstrip or token.rstrip)
        and token.content[0] not in inside
        and not any(text != token.content and text.startswith(token.content) for text in texts)
    }


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], cuts: Mapping[str, int]
) -> list[list[int]]:
    """Token ids of texts, without tokens that the tokenizer adds. cuts: of `find_cuts`; those are used that
    stand in the first text."""
    cuts = {token: number for token, number in cuts.items() if token in texts[0]}
    if not cuts:
        return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"])
    cut = re.compile(f"({'|'.join(map(re.escape, cuts))})")
    parts = [cut.split(text) for text in texts]  # pieces with the token between each two
    pieces = list({piece for part in parts for piece in part[::2] if piece})
    found = tokenizer.backend_tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
    ids: dict[str, list[int]] = {token: [number] for token, number in cuts.items()} | {"": []}
    ids |= {piece: encoding.ids for piece, encoding in zip(pieces, found, strict=True)}
    return [list(itertools.chain.from_iterable(map(ids.__getitem__, part))) for part in parts]


def _sees_a_piece_alone(component: Any) -> bool:
    """Whether a normalizer or pre-tokenizer does the same to a piece of a text as to the piece alone."""
    if component is None:
        return True
    try:
        settings = json.loads(component.__getstate__())
    except Exception:  # of one that is written in Python, and cannot be looked into
        return False
    return all(
        each["type"] in _KINDS and each.get("prepend_scheme") != "first" for each in _components(settings)
    )


def _components(settings: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of a component and of those it is made of."""
    if isinstance(settings, Mapping):
        if "type" in settings:
            yield settings
        for value in settings.values():
            yield from _components(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _components(value)
