"""Replies to a question about a story that stands before it, where no answer is stored: its own sentences."""

import re

import numpy as np

from gtalign_jax.data.item import Item
from gtalign_jax.rewards.tasks.replies.wording import pick, shortened

LONGEST = 30  # words of a sentence that are quoted
_SENTENCE = re.compile(r"(?<=[.?!])[\"'”’]*\s+|\n{2,}")
_WORD = re.compile(r"\w+")


def answer(item: Item, rng: np.random.Generator) -> str | None:
    """The sentence of the story that shares most with the question and what was said; None without."""
    story, _, rest = item.intent.partition("Previous Q&A:\n")
    if not rest:
        story, _, rest = item.intent.partition("Question:\n")
    sentences = [part for part in _SENTENCE.split(story.removeprefix("Context:\n")) if len(part.split()) > 2]
    if not sentences:
        return None
    said = _WORD.findall(rest.lower())
    asked = _WORD.findall(rest.rpartition("Question:\n")[2].lower())
    found = max(sentences, key=lambda text: _shared(text, asked) + 0.3 * _shared(text, said))
    quoted = " ".join(shortened(found, LONGEST).split()).replace('"', "'").replace("<", "(")
    return f"{pick(rng, ('The text says', 'It stands in the text', 'According to the text'))}: “{quoted}”"


def _shared(text: str, words: list[str]) -> float:
    """How much of a question stands in a sentence; a long word tells more than a short one."""
    inside = set(_WORD.findall(text.lower()))
    return sum(len(word) for word in set(words) if len(word) > 3 and word in inside) / len(inside) ** 0.3
