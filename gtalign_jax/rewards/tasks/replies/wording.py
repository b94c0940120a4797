"""Pieces of real questions that a reply may quote, and what may be said before one is answered."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from gtalign_jax.chain.parse import BLOCKS
from gtalign_jax.data.item import Item
from gtalign_jax.game.moves import AQ, CQ, DA

QUOTED = 16  # words of a question that are quoted at most
STEM = 5  # letters that two words of one kind begin with
SHORT = 40  # words of one that is known by one of its sentences
_TAG = re.compile(rf"</?(?:{'|'.join(BLOCKS)})>")
_DRAWING = re.compile(r"\[asy\].*?(?:\[/asy\]|$)", re.DOTALL)
_TASK = re.compile(
    r"(?:Find|Compute|Calculate|Determine|Evaluate|Express|Simplify|Solve|Prove|Explain|Describe)\b"
)
_SENTENCE = re.compile(r"(?<=[.?!])\s+|\n+")
_WORD = re.compile(r"[^\W\d_][\w'-]{3,}")
_COMMON = frozenset(
    """
    about above after again against also another around because been before being between both cannot
    could create describe detailed develop does doing down during each every explain from generate give
    have having help here himself imagine including into itself just like make many more most much must
    need only other over please promoting provide same should some such than that their them then there
    these they this those through under until very want what when where which while will with within
    without would write your yours yourself
    """.split()
)


def subject(question: str) -> str:
    """What a question asks, short enough to be quoted: its last sentence that is a question or sets a task,
    else its first one."""
    cut = _SENTENCE.split(_DRAWING.sub(" ", question))
    parts = [part.strip() for part in cut if len(part.split()) > 1]
    asking = [part for part in parts if part.rstrip("\"'”’)]*").endswith("?") or _TASK.match(part)]
    return quoted((asking[-1:] or parts[:1] or [question.strip() or "this"])[0])


def quoted(text: str) -> str:
    """The first words of a text, without end mark, and without what a chain would take for a tag."""
    words = _TAG.sub(" ", text).split()
    cut = " ".join(words[:QUOTED]).replace("“", "'").replace("”", "'").replace('"', "'")
    return cut.rstrip(" .?!,:;") + (" …" if len(words) > QUOTED else "")


def keywords(question: str) -> str:
    """The two words that say most of what a question is about: long ones, and those that come again."""
    words = [word.lower() for word in _WORD.findall(_TAG.sub(" ", question))]
    told = Counter(word for word in words if word not in _COMMON) or Counter(words or ["this"])
    by_weight = sorted(told, key=lambda word: told[word] * len(word), reverse=True)
    first = by_weight[0]
    second = next((word for word in by_weight if word[:STEM] != first[:STEM]), first)
    return " and ".join(word for word in told if word in (first, second))


def named(question: str) -> str:
    """How a reply names what is asked: by its own sentence where it is short, else by its words."""
    return f"“{subject(question)}”" if len(question.split()) <= SHORT else keywords(question)


def shortened(text: str, words: int) -> str:
    """A text of at most so many words (0: any number), cut after a sentence that ends in its last half."""
    found = list(re.finditer(r"\S+", text))
    if not words or len(found) <= words:
        return text
    cut = text[: found[words - 1].end()]
    end = max(cut.rfind(mark) for mark in (". ", "! ", "? ", ".\n", "!\n", "?\n"))
    whole = cut[-1] in ".!?"
    return cut if whole or end < len(cut) / 2 else cut[: end + 1]


def pick(rng: np.random.Generator, texts: Sequence[str]) -> str:
    """One of them."""
    return texts[int(rng.integers(len(texts)))]


_WHY = {
    DA: (
        "A direct answer settles it at once and costs neither side another turn.",
        "Answering directly gives the user what was asked for and keeps the talk short.",
        "A direct answer serves the user now and leaves me nothing to guess.",
    ),
    CQ: (
        "A question back costs the user a moment and spares both of us a wrong guess.",
        "Asking first is cheap for the user, and what follows can then be right.",
        "One question now lets the next answer fit, which serves both sides.",
    ),
    AQ: (
        "A short answer with one question gives something now and keeps the way open.",
        "Answering and asking once serves the user now and tells me what to add.",
    ),
}
_WHY_NOT = {
    DA: (
        "An answer right away would be a guess that may miss what is meant.",
        "Answering at once risks the wrong thing, which helps nobody.",
    ),
    CQ: (
        "Asking back would only delay it.",
        "A question back would cost the user a turn and tell me nothing that I need.",
    ),
    AQ: (
        "A further question after the answer would add little.",
        "Answering and then asking on would be longer than what is needed.",
    ),
}


def weighed(
    opening: str, action: str, rng: np.random.Generator, why: Mapping[str, Sequence[str]] = _WHY
) -> str:
    """The text of <thinking>: what is asked, why this action serves both, and perhaps why no other does.

    why: action → sentences for it.
    """
    others = [other for other in _WHY_NOT if other != action]
    against = [pick(rng, _WHY_NOT[other]) for other in rng.permutation(others)[: rng.integers(0, 3)]]
    return " ".join([opening, pick(rng, why[action]), *against])


def consider(item: Item, action: str, rng: np.random.Generator) -> str:
    """What may be thought of any question."""
    asked = subject(item.intent)
    known = ("It can be answered as it stands.", "Nothing is missing in it.")
    open_ = ("Something that decides the answer is left open.", "What is wanted is not said in full.")
    said = pick(rng, open_ if action == CQ else known)
    return weighed(f"The user asks: “{asked}”. {said}", action, rng)
