"""Replies to questions that may have several meanings: which one is meant, or what each would lead to."""

from collections.abc import Sequence

import numpy as np

from gtalign_jax.data.item import Item
from gtalign_jax.game.moves import AQ, CQ
from gtalign_jax.rewards.tasks.replies.wording import keywords, pick, quoted, subject, weighed

SHOWN = 3  # meanings that a reply names at most
Meaning = tuple[str, str]
"""A question that has one meaning, and its answer."""


def asked(item: Item) -> str:
    """The question itself, without the story it may be about."""
    return item.intent.rpartition("Question:\n")[2].strip()


def clarify(item: Item, meanings: Sequence[Meaning], rng: np.random.Generator) -> str:
    """One question that tells the meanings apart; without stored meanings, one about what is asked."""
    named = _named(meanings)
    if len(named) > 1:
        lead = pick(rng, ("Which of these do you mean", "Do you mean one of these", "Which one is it"))
        return f"{lead}: {_listed(named, 'or')}?"
    about = subject(asked(item))
    closing = ("Which part of it do you mean", "Which of them do you have in mind")
    return f"More than one thing would answer “{about}”. {pick(rng, closing)}?"


def cover(meanings: Sequence[Meaning], action: str, rng: np.random.Generator) -> str:
    """The answer of each meaning, named with it."""
    told = [
        f"if you mean “{quoted(question)}”, it is {_clause(answer)}" for question, answer in meanings[:SHOWN]
    ]
    text = "; ".join(told)
    lead = pick(rng, ("That depends on what you mean: ", "There are several answers: "))
    return f"{lead}{text}." + (" Which one did you have in mind?" if action == AQ else "")


def answer(item: Item, answers: Sequence[str], action: str, rng: np.random.Generator) -> str:
    """A stored answer to a question of one meaning."""
    first, *others = dict.fromkeys(answers)
    also = f" (also given as {_listed(others[:2], 'or')})" if others else ""
    leads = (f"The answer is {first}{also}.", f"{first}{also}.")
    more = f" Would you like to know more about {keywords(asked(item))}?" if action == AQ else ""
    return pick(rng, leads) + more


def consider(item: Item, meanings: Sequence[Meaning], action: str, rng: np.random.Generator) -> str:
    """What may be thought of such a question."""
    about, named = subject(asked(item)), _named(meanings)
    if action != CQ:
        said = pick(rng, ("It has one meaning and one answer.", "It is clear what is wanted."))
    elif len(named) > 1:
        said = f"That could mean “{named[0]}” or “{named[1]}”, and their answers differ."
    else:
        said = pick(rng, ("More than one thing could be meant.", "It does not say which one is meant."))
    return weighed(f"The question is “{about}”. {said}", action, rng)


def _named(meanings: Sequence[Meaning]) -> list[str]:
    """Different meanings, those with different answers first."""
    by_answer = {answer: quoted(question) for question, answer in reversed(meanings)}
    first = list(by_answer.values())[::-1]
    return list(dict.fromkeys([*first, *(quoted(question) for question, _ in meanings)]))[:SHOWN]


def _listed(texts: Sequence[str], last: str) -> str:
    *most, final = [f"“{text}”" for text in texts]
    return f"{', '.join(most)} {last} {final}" if most else final


def _clause(text: str) -> str:
    return text.strip().rstrip(".;")
