"""A byte-level BPE tokenizer for models made from scratch, saved and loaded as any Hugging Face one.

Tags, newlines, one-decimal payoffs and digits are always cut out first, so that the text around a
payoff matrix tokenises the same whatever the numbers are: a matrix can be edited and spliced back.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gtalign_jax.errors import UserError

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# In order: a tag; a newline; a payoff; the JSON between two payoffs; a digit; a word; marks; spaces.
_PIECES = "|".join(
    (
        r"</?(?:thinking|payoff|analyze|response)>",
        r"\n",
        r" ?-?[0-9]\.[0-9](?![0-9])",
        r"[{}\",][^0-9<\n]{0,40}?:(?= -?[0-9]\.[0-9])",
        r"[0-9]",
        r" ?[\p{L}\p{M}']+",
        r" ?[^\s\p{L}\p{M}0-9<\n]+",
        r"<",
        r"[^\S\n]+",
    )
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with a ChatML template, of at most vocab_size entries; deterministic in the texts."""
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def load_tokenizer(folder: str | pathlib.Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an HF folder. UserError when it has none, or no chat template or end token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tokenizer can be loaded ({str(error).splitlines()[0]})") from error
    if not tokenizer.chat_template:
        raise UserError(f"{folder}: the tokenizer has no chat template")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-sequence token")
    return tokenizer
