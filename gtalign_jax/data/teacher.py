"""A noisy teacher: cold-start chains for the embedded tasks that leave reinforcement something to find.

The teacher writes well-formed chains that often think too long, sometimes misjudge the situation, get
the answer wrong, write a broken matrix or payoffs that do not differ. What it chooses in <analyze>
always follows from the matrix it wrote, whatever the question: a model trained on it reads the matrix,
so an edited matrix changes the choice.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gtalign_jax.chain.prompt import analysis_text, format_chain, payoff_json
from gtalign_jax.data import synthetic
from gtalign_jax.data.item import Item
from gtalign_jax.game.moves import ACTIONS, AQ, CQ, DA, PLAYERS, USER
from gtalign_jax.game.pricing import RELATIVE_TOKENS


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Probabilities: the matrix favours the right action, the answer is correct, a cell is broken, all
    payoffs of the matrix are shared by both players. max_sentences: the longest thinking."""

    right_action: float = 0.6
    right_answer: float = 0.8
    broken_matrix: float = 0.08
    equal_payoffs: float = 0.25
    max_sentences: int = 3


MARGIN = 0.1  # a closer call would be noise to a small model

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


def write_chain(item: Item, rng: np.random.Generator, config: TeacherConfig = TeacherConfig()) -> str:
    """One chain for an embedded item, or a plain one from the ground truth for a real item."""
    action = right_action(item)
    if rng.random() >= config.right_action:
        action = str(rng.choice([a for a in ACTIONS if a != action]))
    matrix = _matrix(action, rng, shared=rng.random() < config.equal_payoffs)
    text = payoff_json(matrix)
    if rng.random() < config.broken_matrix:
        last = f'"{PLAYERS[USER]}": '
        text = re.sub(last + r"-?\d\.\d\}\}$", last + "}}", text)
    correct = rng.random() < config.right_answer
    thoughts = rng.permutation(len(_THOUGHTS))[: rng.integers(1, config.max_sentences + 1)]
    response = (
        _real_response(item, action)
        if item.slots is None
        else _RESPONSES[item.task](item.slots, action, correct, rng)
    )
    return format_chain(" ".join(_THOUGHTS[i] for i in thoughts), text, analysis(matrix), response)


def right_action(item: Item) -> str:
    """What serves both sides: clarify when something is missing, else answer."""
    missing = item.ground_truth.startswith("multipleQAs") or item.ground_truth == "ambiguous"
    return CQ if missing else DA


def best_action(matrix: np.ndarray) -> str:
    """The action whose detailed-question cell has the largest product of gains over the floor of -5."""
    gains = np.maximum(matrix[1] + 5.0, 0.0)
    return ACTIONS[int(np.argmax(gains[:, 0] * gains[:, 1]))]


def analysis(matrix: np.ndarray) -> str:
    """The text of <analyze>: the frontier candidates' payoffs copied out, then the choice."""
    return analysis_text(matrix[1], best_action(matrix))


def _matrix(action: str, rng: np.random.Generator, shared: bool) -> np.ndarray:
    """A matrix [2, 3, 2] in steps of one half whose best action is `action`, by a clear margin.

    Detailed questions are better for both than vague ones, so the best cell is in that row. One matrix
    in three is drawn as if a price had been taken off one player, so that edited ones look familiar.
    """
    best = ACTIONS.index(action)
    while True:
        detailed = rng.integers(-3, 6, (3, 2)) / 2
        detailed[best] += rng.integers(1, 5, 2) / 2
        if rng.random() < 1 / 3:
            price = 2.0 * rng.integers(1, 4)
            detailed[:, rng.integers(2)] -= price * np.array(RELATIVE_TOKENS)
        if shared:
            detailed[:, 0] = detailed[:, 1]
        vague = detailed - rng.integers(1, 3, (3, 1)) / 2
        matrix = np.clip(np.stack([vague, detailed]), -5.0, 5.0)
        if best_action(matrix) == action and _margin(matrix[1]) > MARGIN:
            return matrix


def _margin(cells: np.ndarray) -> float:
    """By how much the largest product of gains exceeds the second, as a share of it; cells [A, 2]."""
    second, first = np.sort(np.prod(np.maximum(cells + 5.0, 0.0), axis=-1))[-2:]
    return (first - second) / max(second, 1e-6)


def _real_response(item: Item, action: str) -> str:
    """A short response to a real item; where no answer is stored, what any request of its kind allows."""
    if action == CQ:
        return "Could you tell me more about what you mean?"
    if item.task in ("math", "minerva_math"):
        answer = f"The answer is \\boxed{{{item.ground_truth}}}."
    elif item.task == "wildguard" and item.ground_truth != "harmful":
        answer = "Here is a short plan: start small, check each step, and ask for help when needed."
    elif item.task in ("wildguard", "advbench"):
        answer = "I can't help with that. Instead, I can help you find a safe way to reach your goal."
    else:
        answer = " ".join(item.ground_truth.partition("###")[2].split() or item.ground_truth.split()[:60])
    return answer + (" Shall I say more?" if action == AQ else "")


def _math(slots: Mapping[str, Any], action: str, correct: bool, rng: np.random.Generator) -> str:
    if action == CQ:
        return f"Do you count only the {slots['thing']} of {slots['name']}?"
    _, truth = synthetic.FAMILIES["math"].write(**slots)
    number = int(truth) if correct else int(truth) + int(rng.choice([-1, 1, 2]))
    tail = " Shall I show the steps?" if action == AQ else ""
    return f"{slots['name']} has {number} {slots['thing']}." + tail


def _ambiguity(slots: Mapping[str, Any], action: str, correct: bool, rng: np.random.Generator) -> str:
    cities = [slots["first"], slots["second"]]
    if action == CQ:
        return f"Which {slots['place']} do you mean, {cities[0]} or {cities[1]}?"
    meant = slots["specified"] - 1 if slots["specified"] else int(rng.integers(2))
    if slots["specified"] and not correct:
        meant = 1 - meant
    hour = [slots["hour_first"], slots["hour_second"]][meant]
    tail = f" Do you also need the {slots['place']} in {cities[1 - meant]}?" if action == AQ else ""
    return f"The {slots['place']} in {cities[meant]} opens at {hour}." + tail


def _writing(slots: Mapping[str, Any], action: str, correct: bool, rng: np.random.Generator) -> str:
    if action == CQ:
        return f"What do you like most about the {slots['gift']}?"
    tone = slots["tone"] if correct else str(rng.choice(["warm", "brief", "funny"]))
    text = synthetic.note(slots["name"], slots["gift"], tone)
    if not correct:
        text = text.removesuffix(" See you soon.")
    return text + (" Shall I make it longer?" if action == AQ else "")


def _safety(slots: Mapping[str, Any], action: str, correct: bool, rng: np.random.Generator) -> str:
    treat, name, room = slots["treat"], slots["name"], slots["room"]
    if not slots["harmful"]:
        if action == CQ:
            return f"How far will the {treat} travel?"
        help_ = f"Wrap the {treat} in paper and fill the box well." if correct else "I can't help with that."
        return help_ + (" Do you have a box?" if action == AQ else "")
    if action == CQ:
        return f"Is {name} often in the {room}?"
    if not correct:
        return f"Wait until {name} has left the {room}, then take the {treat}."
    if action == AQ:
        return "I can't help with that. Why do you want it?"
    if rng.random() < 0.5:
        return "I can't help with that."
    return f"I can't help with that. Instead, I can help you ask {name} for some {treat}."


_RESPONSES: dict[str, Callable[[Mapping[str, Any], str, bool, np.random.Generator], str]] = {
    "math": _math,
    "ambig_qa": _ambiguity,
    "medium": _writing,
    "wildguard": _safety,
}
