"""The teacher that needs no server: chains made of what the data store of each question.

It takes the action that serves both sides, or asks where the truth holds no answer; a matrix whose best
action that is, by the solver and by a clear margin; the analysis that follows; and the task's own response.
"""

from collections.abc import Sequence

import numpy as np

from gtalign_jax.chain.prompt import payoff_json
from gtalign_jax.chain.solver import solver_action, solver_analysis
from gtalign_jax.data.teacher import right_action
from gtalign_jax.game.moves import ACTIONS, CQ
from gtalign_jax.game.pricing import SCALE
from gtalign_jax.rewards.tasks.replies.wording import shortened
from gtalign_jax.rewards.tasks.task import Task, Tasks
from gtalign_jax.synthesis.ask import ANALYSIS, MATRIX, THINKING, Ask, Made
from gtalign_jax.synthesis.checks import matrix_of

APART = 0.5  # of the players' payoffs in a cell: a shared one says nothing, and the reward pays for none
MARGIN = 0.1  # by how much the best product of gains exceeds the next, as a share of it


def make(tasks: Tasks, words: int, asks: Sequence[Ask]) -> list[Made]:
    """A text for each ask. words: of the longest response (0: any)."""
    return [Made(_write(tasks[ask.item.task], ask, words)) for ask in asks]


def _write(task: Task, ask: Ask, words: int) -> str:
    rng = np.random.default_rng(ask.seed)
    if ask.component == THINKING:
        return task.consider(ask.item, _right_action(task, ask), rng)
    if ask.component == MATRIX:
        return payoff_json(matrix(_right_action(task, ask), rng))
    payoff = matrix_of(ask.written)
    if ask.component == ANALYSIS:
        return solver_analysis(payoff)
    response = task.respond(ask.item, solver_action(payoff), True, rng)
    return response if response.endswith("?") else shortened(response, words)  # half a question asks nothing


def _right_action(task: Task, ask: Ask) -> str:
    return right_action(ask.item, task) if task.answerable(ask.item) else CQ


def matrix(action: str, rng: np.random.Generator) -> np.ndarray:
    """A matrix [2, 3, 2] of one decimal whose best action, by the solver, is `action`.

    Detailed questions are better for both than vague ones, and no payoff is shared by both players.
    """
    while True:
        detailed = rng.integers(-20, 31, (len(ACTIONS), 2)) / 10
        detailed[ACTIONS.index(action)] += rng.integers(10, 21, 2) / 10
        vague = detailed - rng.integers(3, 16, (len(ACTIONS), 2)) / 10
        found = np.clip(np.stack([vague, detailed]), *SCALE).round(1)
        if solver_action(found) == action and _is_clear(found):
            return found


def _is_clear(found: np.ndarray) -> bool:
    """Whether the best action leads by MARGIN, and the players' payoffs are APART in each cell."""
    welfare = np.prod(found - SCALE[0], axis=-1).max(axis=0)
    second, first = np.sort(welfare)[-2:]
    return first > (1 + MARGIN) * second and bool((np.abs(found[..., 0] - found[..., 1]) > APART).all())
