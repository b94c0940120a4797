"""Replies to a request for a piece of writing whose reference is stored."""

import re

import numpy as np

from gtalign_jax.data.item import Item
from gtalign_jax.game.moves import AQ, CQ
from gtalign_jax.rewards.tasks.replies.wording import pick, subject, weighed

_ABOUT = re.compile(r"\babout:?\s*\n+(.*\S)", re.DOTALL)


def topic(item: Item) -> str:
    """What the piece is to be about."""
    named = _ABOUT.search(item.intent)
    return subject(named[1] if named else item.intent)


def write(item: Item, action: str, rng: np.random.Generator) -> str:
    """The reference, or a question about the piece."""
    if action == CQ:
        wanted = ("Who is going to read it", "Which point matters most to you", "What tone should it have")
        return f"I can write about “{topic(item)}”. {pick(rng, wanted)}?"
    return item.ground_truth.strip() + ("\n\nShall I change its tone or length?" if action == AQ else "")


def consider(item: Item, action: str, rng: np.random.Generator) -> str:
    """What may be thought of such a request."""
    clear = ("Subject and length are given.", "A whole draft can be judged and changed by the user.")
    open_ = ("Whom it is for is left open.", "The angle is left open.")
    said = pick(rng, open_ if action == CQ else clear)
    return weighed(f"The user wants an article about “{topic(item)}”. {said}", action, rng)
