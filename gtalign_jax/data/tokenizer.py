"""A byte-level BPE tokenizer for models made from scratch: Qwen2's own kind, trained on the run's text.

It is a `Qwen2Tokenizer`, so `AutoTokenizer` reads it back as the very same one beside a Qwen2 model.
The strings of the chain protocol (tags, the JSON between two payoffs, payoffs of one decimal, the units of a
welfare) are added tokens: they are cut out before anything else, so the text around a payoff matrix tokenises
the same whatever the numbers are, and a matrix can be edited and spliced back.
"""

import re
from collections.abc import Iterable

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from gtalign_jax.chain.parse import BLOCKS
from gtalign_jax.game.moves import KEYS, PLAYERS

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def protocol_strings() -> tuple[str, ...]:
    """The tags and the pieces of a canonical payoff matrix and of an analysis, as `chain.prompt` writes them.

    The decimals of a welfare are digits: two of them are sooner learnt to compare than a hundred tokens.
    """
    tags = [f"<{slash}{block}>" for block in BLOCKS for slash in ("", "/")]
    first, second = PLAYERS
    cells = [f'{"{" if i == 0 else "}, "}"{key}": {{"{first}":' for i, key in enumerate(KEYS)]
    payoffs = [f" {tenths / 10:.1f}" for tenths in range(-50, 51)]
    welfares = [f" = {units}." for units in range(11)]
    return (*tags, *cells, f', "{second}":', "}}", *payoffs, *welfares)


# All bytes, the tags and pieces of a matrix and an analysis, and three tokens of the chat format.
SMALLEST = 256 + len(protocol_strings()) + 3


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer with a ChatML template, of at most vocab_size entries (SMALLEST or more); deterministic in
    the texts."""
    protocol = protocol_strings()
    cut = re.compile("|".join(map(re.escape, protocol)))
    pieces = (piece for text in texts for piece in cut.split(text) if piece)
    base = Qwen2Tokenizer()
    wrapped = base.train_new_from_iterator(
        pieces, vocab_size - len(protocol), new_special_tokens=[START, END], show_progress=False
    )
    wrapped.add_tokens([AddedToken(text, normalized=False) for text in protocol])
    wrapped.eos_token, wrapped.pad_token = END, PAD
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
