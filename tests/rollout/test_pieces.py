"""Texts tokenised in pieces have the ids that they have whole, whatever kind the tokenizer is of."""

import functools

import hypothesis
import pytest
import tokenizers
import transformers
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers

from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.rollout import pieces

TEXTS = ["the payoff of a clear question 12 345 é Å ﬁ </payoff>\n", "Play the game, then respond.\n\n"] * 3
SPECIAL = ("<s>", "</s>", "[INST]", "<|end|>")
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s+"
MARKED = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLIT = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")


def metaspace(scheme):
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)


def made(model, trainer, normalizer=None, pre_tokenizer=None, added=SPECIAL):
    """A tokenizer of a kind, which begins texts with <s> where it may."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.train_from_iterator(TEXTS, trainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False))
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    wrapped.add_tokens([t if isinstance(t, AddedToken) else AddedToken(t, special=True) for t in added])
    begin = [("<s>", wrapped.convert_tokens_to_ids("<s>"))]
    backend = wrapped.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    return wrapped


bpe = functools.partial(made, models.BPE(unk_token="<unk>"), trainers.BpeTrainer)
bytes_bpe = functools.partial(
    made,
    models.BPE(),
    functools.partial(trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
)
KINDS = {
    "qwen2": lambda: train_tokenizer(TEXTS, 500),
    "llama3": lambda: bytes_bpe(None, pre_tokenizers.Sequence([SPLIT, BYTES])),
    "roberta": lambda: bytes_bpe(normalizers.NFKC(), pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama2": lambda: bpe(MARKED),
    "gemma": lambda: bpe(normalizers.Replace(" ", "▁"), metaspace("never")),
    "every_piece_marked": lambda: bpe(None, metaspace("always")),
    "bert": lambda: made(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer,
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    ),
    "unigram": lambda: made(
        models.Unigram(),
        functools.partial(trainers.UnigramTrainer, unk_token="<unk>"),
        normalizers.NFKC(),
        metaspace("always"),
    ),
    "takes_spaces": lambda: bytes_bpe(
        added=(*SPECIAL, AddedToken("<mask>", lstrip=True, rstrip=True, special=True)), pre_tokenizer=BYTES
    ),
}
parts = st.sampled_from(
    [*SPECIAL, "<|im_start|>", "<|im_end|>\n", "<mask>", "<", "|>", "</", " ", "  ", "\n", "\n\n", "the game"]
    + ["the", " payoff", "Play", "1234", "e\u0301", "\u0301", "ﬁ", "日本", "▁", "'s", "</payoff>", " -1.0"]
)
texts = st.lists(parts | st.text(max_size=3), max_size=14).map("".join)


@pytest.fixture(scope="module")
def kinds():
    return {name: make() for name, make in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(data=st.lists(texts, min_size=1, max_size=4))
@hypothesis.settings(max_examples=150)
def test_pieces_have_the_ids_of_the_whole_text(kinds, kind, data):
    tokenizer = kinds[kind]
    cuts = pieces.find_cuts(tokenizer)
    assert cuts and "<mask>" not in cuts
    whole = tokenizer(data, add_special_tokens=False)["input_ids"]
    for first in (data[0], "".join(cuts)):  # the tokens of the first text are those that all are cut at
        found = pieces.encode(tokenizer, [first, *data], cuts)
        assert found[1:] == whole


LONGER = AddedToken("<s>!", normalized=False)
REFUSED = {
    "marks_the_first_piece": lambda: bpe(None, metaspace("first")),
    "one_at_word_bounds": lambda: bytes_bpe(
        pre_tokenizer=BYTES, added=(*SPECIAL, AddedToken("word", single_word=True))
    ),
    "after_normalizing": lambda: bytes_bpe(
        pre_tokenizer=BYTES, added=[AddedToken(token, special=True, normalized=True) for token in SPECIAL]
    ),
    "overlapped": lambda: bytes_bpe(
        pre_tokenizer=BYTES, added=("<s>", "</s>", AddedToken("a<", normalized=False))
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_texts_are_not_cut_where_it_is_not_certain(kind):
    assert not {*SPECIAL} & {*pieces.find_cuts(REFUSED[kind]())}


def test_a_token_that_begins_a_longer_one_is_no_place_to_cut():
    tokenizer = bytes_bpe(pre_tokenizer=BYTES, added=(*SPECIAL, LONGER))
    assert set(SPECIAL) - set(pieces.find_cuts(tokenizer)) == {"<s>"}


def test_special_tokens_that_are_read_as_text_are_no_places_to_cut():
    tokenizer = train_tokenizer(TEXTS, 500)
    tokenizer.split_special_tokens = True
    assert pieces.find_cuts(tokenizer) == {}


def test_a_normalizer_of_ones_own_is_not_trusted():
    class Mine:
        def normalize(self, text):
            text.lowercase()

    tokenizer = train_tokenizer(TEXTS, 500)
    tokenizer.backend_tokenizer.normalizer = normalizers.Normalizer.custom(Mine())
    assert pieces.find_cuts(tokenizer) == {}


def test_what_stands_in_many_texts_is_tokenised_once(kinds, monkeypatch):
    tokenizer, seen = kinds["qwen2"], []
    backend = tokenizer.backend_tokenizer

    class Counted:
        def encode_batch_fast(self, texts, **options):
            seen.extend(texts)
            return backend.encode_batch_fast(texts, **options)

    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", Counted())
    texts = [f"<|im_start|>Play the game<|im_end|>\n<|im_start|>{i}<|im_end|>\n" for i in range(9)]
    cuts = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")}
    pieces.encode(tokenizer, texts, cuts)
    assert sorted(seen) == sorted([*map(str, range(9)), "Play the game", "\n"])
