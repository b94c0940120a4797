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

from gtalign_jax.chain.prompt import format_chain, payoff_json
from gtalign_jax.chain.solver import solver_analysis
from gtalign_jax.data import matrices
from gtalign_jax.data.item import Item
from gtalign_jax.errors import UserError
from gtalign_jax.game.moves import ACTIONS, PLAYERS, USER


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Probabilities: the matrix favours the right action, the answer is correct, a cell is broken, all
    payoffs of the matrix are shared by both players. max_sentences: the longest thinking."""

    right_action: float = 0.6
    right_answer: float = 0.8
    broken_matrix: float = 0.08
    equal_payoffs: float = 0.25
    max_sentences: int = 3


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
    matrix = matrices.drawn(action, rng, shared=rng.random() < config.equal_payoffs)
    text = payoff_json(matrix)
    if rng.random() < config.broken_matrix:
        last = f'"{PLAYERS[USER]}": '
        text = re.sub(last + r"-?\d\.\d\}\}$", last + "}}", text)
    correct = rng.random() < config.right_answer
    thoughts = rng.permutation(len(_THOUGHTS))[: rng.integers(1, config.max_sentences + 1)]
    response = task.respond(item, action, correct, rng)
    return format_chain(" ".join(_THOUGHTS[i] for i in thoughts), text, solver_analysis(matrix), response)


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
