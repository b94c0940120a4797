"""What a teacher is asked for and what it gives: one component of one candidate of one prompt's chain."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

from gtalign_jax.data.item import Item
from gtalign_jax.errors import MAX_COUNT

THINKING, MATRIX, ANALYSIS, RESPONSE = COMPONENTS = ("thinking", "matrix", "analysis", "response")
CUT = "cut off at max_tokens"  # why a model's answer is no component


@dataclasses.dataclass(frozen=True)
class Ask:
    """component: which one. written: the candidate's earlier ones, by name; a matrix as `payoff_json` writes.

    seed: of this component, candidate and attempt; it follows from the prompt, not from its place.
    """

    item: Item
    component: str
    written: Mapping[str, str]
    seed: int


@dataclasses.dataclass(frozen=True)
class Made:
    """What came back: a text, or the reason for none. tokens_in, tokens_out: what a model read and wrote."""

    text: str | None
    reason: str = ""
    tokens_in: int = 0
    tokens_out: int = 0


Make = Callable[[Sequence[Ask]], list[Made]]
"""One `Made` an `Ask`, in order; the same for the same asks, whatever stands beside them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """name, model: as the config says, for the record. on_mesh: all hosts make together, else the first."""

    name: str
    model: str
    make: Make
    on_mesh: bool = False


def prompt_digest(item: Item) -> str:
    """A name of a prompt that follows from all that a teacher may see of it."""
    parts = [item.task, item.intent, item.ground_truth, [dict(message) for message in item.messages]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def seed_of(digest: str, *parts: int | str) -> int:
    """A seed that servers and engines take, of a prompt's digest and what else tells asks apart."""
    text = json.dumps([digest, *parts]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") % MAX_COUNT


def question(item: Item) -> str:
    """What was asked, without instructions: the talk where there are several turns, else the intent."""
    turns = [message for message in item.messages if message["role"] != "system"]
    if len(turns) < 2:
        return item.intent
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in turns)
