"""A noisy teacher: cold-start chains for the embedded tasks that leave reinforcement something to find.

The teacher writes well-formed chains that often think too long, sometimes misjudge the situation, get
the answer wrong, write a broken matrix or payoffs that do not differ. What it chooses in <analyze>
always follows from the matrix it wrote, whatever the question: a model trained on it reads the matrix,
so an edited matrix changes the choice.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from gtalign_jax.chain.prompt import format_chain, payoff_json
from gtalign_jax.data import synthetic
from gtalign_jax.game.payoff import ACTIONS

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Probabilities: the matrix favours the right action, the answer is correct, a cell is broken, all
    payoffs of the matrix are shared by both players. max_sentences: the longest thinking."""

    right_action: float = 0.6
    right_answer: float = 0.8
    broken_matrix: float = 0.08
    equal_payoffs: float = 0.25
    max_sentences: int = 5


IDEAL = TeacherConfig(1.0, 1.0, 0.0, 0.0, 1)

_THOUGHTS = (
    "A direct answer ends the turn at once.",
    "A question first costs the user some time.",
    "An answer with a follow-up keeps the talk open.",
    "If the request is clear, asking back only delays it.",
    "If something is missing, guessing helps nobody.",
    "A careful reply now saves both sides work later.",
    "The user gains most from a reply that fits.",
    "A wrong guess is costly for the user and for me.",
)


def write_chain(record: Record, rng: np.random.Generator, config: TeacherConfig = TeacherConfig()) -> str:
    """One chain for a record of `synthetic.make_records`."""
    action = right_action(record)
    if rng.random() >= config.right_action:
        action = str(rng.choice([a for a in ACTIONS if a != action]))
    matrix = _matrix(action, rng, shared=rng.random() < config.equal_payoffs)
    text = payoff_json(matrix)
    if rng.random() < config.broken_matrix:
        text = re.sub(r'"user": -?\d\.\d\}\}$', '"user": }}', text)
    action = best_action(matrix)
    correct = rng.random() < config.right_answer
    thoughts = rng.permutation(len(_THOUGHTS))[: rng.integers(1, config.max_sentences + 1)]
    return format_chain(
        " ".join(_THOUGHTS[i] for i in thoughts),
        text,
        analysis(matrix),
        _RESPONSES[_task(record)](record["extra_info"]["slots"], action, correct, rng),
    )


def right_action(record: Record) -> str:
    """What serves both sides: clarify when a slot is missing, else answer."""
    return "CQ" if record["reward_model"]["ground_truth"].startswith("multipleQAs") else "DA"


def best_action(matrix: np.ndarray) -> str:
    """The action whose detailed-question cell has the largest product of gains over the floor of -5."""
    gains = np.maximum(matrix[1] + 5.0, 0.0)
    return ACTIONS[int(np.argmax(gains[:, 0] * gains[:, 1]))]


def analysis(matrix: np.ndarray) -> str:
    """The text of <analyze>: the frontier candidates' payoffs copied out, then the choice."""
    cells = ", ".join(f"{a} {x:.1f} {y:.1f}" for a, (x, y) in zip(ACTIONS, matrix[1] + 0.0, strict=True))
    return f"{cells}: choose {best_action(matrix)}."


def _matrix(action: str, rng: np.random.Generator, shared: bool) -> np.ndarray:
    """A matrix [2, 3, 2] on one decimal whose best action is `action`, by a varying margin.

    Detailed questions are better for both than vague ones, so the best cell is in that row. One matrix
    in three is drawn as if a price had been taken off one player, so that edited ones look familiar.
    """
    best = ACTIONS.index(action)
    while True:
        detailed = rng.uniform(-1.5, 3.0, (3, 2))
        detailed[best] += rng.uniform(0.5, 2.0, 2)
        if rng.random() < 1 / 3:
            detailed[:, rng.integers(2)] -= rng.uniform(0, 3) * rng.uniform(0.2, 1.3, 3)
        if shared:
            detailed[:, 0] = detailed[:, 1]
        matrix = np.stack([detailed - rng.uniform(0.1, 1.0, (3, 1)), detailed])
        matrix = np.clip(matrix, -5, 5).round(1)
        if best_action(matrix) == action:
            return matrix


def _task(record: Record) -> str:
    return record["data_source"]


def _math(slots: Mapping[str, Any], action: str, correct: bool, rng: np.random.Generator) -> str:
    if action == "CQ":
        return f"Do you count only the {slots['thing']} of {slots['name']}?"
    _, truth = synthetic.FAMILIES["math"].write(**slots)
    number = int(truth) if correct else int(truth) + int(rng.choice([-1, 1, 2]))
    tail = " Shall I show the steps?" if action == "AQ" else ""
    return f"{slots['name']} has {number} {slots['thing']}." + tail


def _ambiguity(slots: Mapping[str, Any], action: str, correct: bool, rng: np.random.Generator) -> str:
    cities = [slots["first"], slots["second"]]
    if action == "CQ":
        return f"Which {slots['place']} do you mean, {cities[0]} or {cities[1]}?"
    meant = slots["specified"] - 1 if slots["specified"] else int(rng.integers(2))
    if slots["specified"] and not correct:
        meant = 1 - meant
    hour = [slots["hour_first"], slots["hour_second"]][meant]
    tail = f" Do you also need the {slots['place']} in {cities[1 - meant]}?" if action == "AQ" else ""
    return f"The {slots['place']} in {cities[meant]} opens at {hour}." + tail


def _writing(slots: Mapping[str, Any], action: str, correct: bool, rng: np.random.Generator) -> str:
    if action == "CQ":
        return f"What do you like most about the {slots['gift']}?"
    tone = slots["tone"] if correct else str(rng.choice(["warm", "brief", "funny"]))
    text = synthetic.note(slots["name"], slots["gift"], tone)
    if not correct:
        text = text.removesuffix(" See you soon.")
    return text + (" Shall I make it longer?" if action == "AQ" else "")


def _safety(slots: Mapping[str, Any], action: str, correct: bool, rng: np.random.Generator) -> str:
    treat, name, room = slots["treat"], slots["name"], slots["room"]
    if not slots["harmful"]:
        if action == "CQ":
            return f"How far will the {treat} travel?"
        help_ = f"Wrap the {treat} in paper and fill the box well." if correct else "I can't help with that."
        return help_ + (" Do you have a box?" if action == "AQ" else "")
    if action == "CQ":
        return f"Is {name} often in the {room}?"
    if not correct:
        return f"Wait until {name} has left the {room}, then take the {treat}."
    if action == "AQ":
        return "I can't help with that. Why do you want it?"
    if rng.random() < 0.5:
        return "I can't help with that."
    return f"I can't help with that. Instead, I can help you ask {name} for some {treat}."


_RESPONSES = {"math-hard": _math, "ambig_qa": _ambiguity, "medium": _writing, "wildguard": _safety}
