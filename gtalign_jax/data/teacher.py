"""A noisy teacher: cold-start chains that leave reinforcement something to find.

The teacher writes well-formed chains that often think too long, sometimes misjudge the situation, get
the answer wrong, write a broken matrix or payoffs that do not differ. What it chooses in <analyze>
always follows from the matrix it wrote, whatever the question: a model trained on it reads the matrix,
so an edited matrix changes the choice.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Protocol

import numpy as np

from gtalign_jax.chain.prompt import analysis_text, format_chain, payoff_json
from gtalign_jax.data.item import Item
from gtalign_jax.errors import UserError
from gtalign_jax.game.moves import ACTIONS, PLAYERS, USER
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


class Demonstrated(Protocol):
    """What the teacher needs to know of a task: what serves both sides, and how that is said."""

    @property
    def right_action(self) -> Callable[[Item], str]: ...

    @property
    def respond(self) -> Callable[[Item, str, bool, np.random.Generator], str]: ...


def write_chain(
    item: Item, task: Demonstrated, rng: np.random.Generator, config: TeacherConfig = TeacherConfig()
) -> str:
    """One chain for an item of a task; UserError when the task names no action of the game."""
    action = _action(item, task, rng, config)
    matrix = _matrix(action, rng, shared=rng.random() < config.equal_payoffs)
    text = payoff_json(matrix)
    if rng.random() < config.broken_matrix:
        last = f'"{PLAYERS[USER]}": '
        text = re.sub(last + r"-?\d\.\d\}\}$", last + "}}", text)
    correct = rng.random() < config.right_answer
    thoughts = rng.permutation(len(_THOUGHTS))[: rng.integers(1, config.max_sentences + 1)]
    response = task.respond(item, action, correct, rng)
    return format_chain(" ".join(_THOUGHTS[i] for i in thoughts), text, analysis(matrix), response)


def write_answer(
    item: Item, task: Demonstrated, rng: np.random.Generator, config: TeacherConfig = TeacherConfig()
) -> str:
    """An answer without a chain: a response that is right, and carries out the right action, as often."""
    action = _action(item, task, rng, config)
    return task.respond(item, action, rng.random() < config.right_answer, rng)


def _action(item: Item, task: Demonstrated, rng: np.random.Generator, config: TeacherConfig) -> str:
    """What is done in the end: the right action, or by chance another."""
    action = right_action(item, task)
    if rng.random() >= config.right_action:
        action = str(rng.choice([a for a in ACTIONS if a != action]))
    return action


def right_action(item: Item, task: Demonstrated) -> str:
    """The action that a task names for an item; UserError when it is none of the game."""
    action = task.right_action(item)
    if action not in ACTIONS:
        raise UserError(
            f"task {item.task!r}: its right_action gave {action!r}; use one of {', '.join(ACTIONS)}"
        )
    return action


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
