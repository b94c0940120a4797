"""The bytes of tokens, joined, are the text the tokenizer decodes."""

import hypothesis
import pytest
import tokenizers
import transformers
from hypothesis import strategies as st

from gtalign_jax.errors import UserError
from gtalign_jax.rollout.token_bytes import token_bytes


def _byte_fallback_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """As Llama 2 has it: pieces with a space mark, and a token for each byte."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581",
        "\u2581a",
        "<",
        "é",
        "}",
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _check(tokenizer, ids: list[int]) -> None:
    found = token_bytes(tokenizer, len(tokenizer) + 3)
    ids = [i % len(tokenizer) for i in ids]
    ids = [i for i in ids if found[i] is not None]
    joined = b"".join(found[i] for i in ids).decode(errors="replace")
    assert joined == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


ids = st.lists(st.integers(0, 400), max_size=20)


@hypothesis.given(ids=ids)
def test_byte_level_tokens_cut_inside_characters_join_to_the_decoded_text(tokenizer, ids):
    _check(tokenizer, ids)


@pytest.mark.parametrize("text", ["payoff é 日本 😀\n", '<payoff>\n{"DQ_AQ": {"LLM": -5.0, "user": 0.1}'])
def test_encoded_text_comes_back(tokenizer, text):
    found = token_bytes(tokenizer, len(tokenizer))
    assert b"".join(found[i] for i in tokenizer(text)["input_ids"]).decode() == text


def test_byte_fallback_tokens_join_to_the_decoded_text():
    tokenizer = _byte_fallback_tokenizer()
    e_acute, left_byte = 3 + 0xC3, 3 + 0xA9
    _check(tokenizer, [260, e_acute, left_byte, 261, 262, 259, 263])
    assert token_bytes(tokenizer, 265)[:4] == [None, None, None, b"\x00"]
    assert token_bytes(tokenizer, 265)[260] == b" a"


def test_special_tokens_and_ids_beyond_the_vocabulary_are_no_text(tokenizer):
    found = token_bytes(tokenizer, len(tokenizer) + 5)
    assert all(found[i] is None for i in (*tokenizer.all_special_ids, *range(len(tokenizer), len(found))))
    assert sum(text is None for text in found) == len(set(tokenizer.all_special_ids)) + 5


def test_another_kind_of_tokenizer_is_refused():
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.decoder = tokenizers.decoders.WordPiece()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(UserError, match=r"decoder \(WordPiece\).*switch the constraint off"):
        token_bytes(tokenizer, 2)
