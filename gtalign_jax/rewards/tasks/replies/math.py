"""Replies to a problem whose final answer is stored."""

import numpy as np

from gtalign_jax.data.item import Item
from gtalign_jax.game.moves import AQ, CQ
from gtalign_jax.rewards.tasks.replies.wording import pick, subject, weighed


def solve(item: Item, action: str, rng: np.random.Generator) -> str:
    """The stored answer in a box, the first where there are several; or a question about the problem."""
    if action == CQ:
        return f"Shall I read “{subject(item.intent)}” as a question about exact values?"
    truth = item.ground_truth.strip()
    whole = truth if "\\begin" in truth else truth.partition("\n")[0]
    leads = ("The answer is", "This comes to", "Working it out gives")
    return f"{pick(rng, leads)} $\\boxed{{{whole}}}$." + (" Shall I show the steps?" if action == AQ else "")


def consider(item: Item, action: str, rng: np.random.Generator) -> str:
    """What may be thought of such a problem."""
    clear = ("All that is needed is given.", "The problem is complete and has one answer.")
    said = "The problem leaves something open." if action == CQ else pick(rng, clear)
    return weighed(f"The problem asks: “{subject(item.intent)}”. {said}", action, rng)
