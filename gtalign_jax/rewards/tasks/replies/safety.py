"""Replies to requests that may be harmful: a refusal with something safe that fits, or a question first."""

import re

import numpy as np

from gtalign_jax.data.item import Item
from gtalign_jax.game.moves import AQ, CQ
from gtalign_jax.rewards.tasks.replies.topics import topic_of
from gtalign_jax.rewards.tasks.replies.wording import keywords, named, pick, weighed

_STEPS = re.compile(r"\bhow (?:can|do|to|should|would)\b|\bsteps?\b|\bguide\b|\btips?\b", re.IGNORECASE)
_TEXT = re.compile(
    r"\b(?:story|stories|novel|poem|script|song|scene|character|write|compose|draft|blog|essay)",
    re.IGNORECASE,
)


def refuse(item: Item, action: str, rng: np.random.Generator) -> str:
    """A refusal that offers something safe in its place; as CQ it asks for the need behind the request."""
    refused, offers = _of(item)
    offered = pick(rng, offers)
    if action == CQ:
        return (
            f"I can't help with {refused}, but I can help with the need behind it: what do you want to reach?"
        )
    lead = pick(rng, ("I can't help with", "I'm sorry, but I can't help with", "I won't help with"))
    more = " Would that be of use to you?" if action == AQ else ""
    about = pick(rng, ("", f" where it is about {keywords(item.intent)}:"))
    return f"{lead} {refused}. Instead, I can help you{about or ' with'} {offered}.{more}"


def ask(item: Item, rng: np.random.Generator) -> str:
    """What must be known before a harmless request can be met; no answer to it is stored."""
    if _TEXT.search(item.intent):
        wanted = ("how long should it be, and in what tone", "which part of it shall I write first")
    elif _STEPS.search(item.intent):
        wanted = ("what have you tried so far", "which step gives you the most trouble")
    else:
        wanted = (
            "do you want a short overview, or one part of it in depth",
            "what do you want to use it for",
        )
    about = pick(rng, (named(item.intent), keywords(item.intent)))
    return f"I am glad to help with {about}: {pick(rng, wanted)}?"


def consider(item: Item, harmful: bool, action: str, rng: np.random.Generator) -> str:
    """What may be thought of a request whose label is known."""
    if not harmful:
        said = pick(
            rng, ("It is harmless, and what helps most depends on its use.", "Nothing in it does harm.")
        )
        return weighed(f"The user asks for help with {named(item.intent)}. {said}", action, rng)
    opening = f"This is about {keywords(item.intent)}, and it asks for {_of(item)[0]}."
    why = (
        "A refusal that offers a safe way keeps people from harm and still helps the user.",
        "Declining and offering something safe serves the user better than a bare no.",
    )
    return weighed(opening, action, rng, {action: why})


def _of(item: Item) -> tuple[str, tuple[str, str]]:
    """(what is refused, what is offered) for a request: by its topic, else by its own words."""
    if topic := topic_of(item.intent):
        return topic.refused, topic.offered
    about = keywords(item.intent)
    return "what could hurt or mislead people", (
        f"what is known about {about}, in a way that is safe and fair",
        f"a version of it on {about} that does no harm",
    )
