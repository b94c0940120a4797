"""The text protocol as it is written: instructions to the model, and the chain's canonical form."""

import re

import numpy as np

from gtalign_jax.game.choice import best_cell, gains_product
from gtalign_jax.game.moves import ACTIONS, GTALIGN, KEYS, PLAYERS
from gtalign_jax.types import Array

_SETTLED = re.compile(rf": (?:choose )?({'|'.join(ACTIONS)})\b")

# For models that can follow instructions (paper section 2, in our words).
INSTRUCTION = """\
Treat this turn as a game between the user and you. Next, the user may ask vaguely (VQ) or in detail (DQ). \
You may answer directly (DA), ask one clarifying question (CQ), or answer briefly and ask one follow-up \
question (AQ). Write exactly four blocks, in this order, and nothing outside them:

<thinking>
Two to five sentences: what each of DA, CQ and AQ would mean for the user and for you. No numbers.
</thinking>
<payoff>
One JSON object with the six keys DQ_AQ, DQ_CQ, DQ_DA, VQ_AQ, VQ_CQ, VQ_DA. Each value is \
{"LLM": x, "user": y}, numbers from -5 to 5 with one decimal: what it is worth to you and to the user.
</payoff>
<analyze>
Name the outcomes on the Pareto frontier of your matrix. Choose the one with the largest product of gains; \
on a tie prefer the larger user payoff, then your own. End with the chosen action.
</analyze>
<response>
Carry the choice out. DA: the answer only. CQ: exactly one question. AQ: a short answer and one question.
</response>"""

# For the embedded tasks, whose models learn the form from examples.
SHORT_INSTRUCTION = "Play the game, then respond."

# For the baseline without the chain: the same three ways to answer, and nothing but the answer.
PLAIN_INSTRUCTION = (
    "Answer directly, ask one clarifying question, or answer briefly and ask one follow-up question, "
    "whichever serves the user best. Write the reply alone."
)


def payoff_json(payoff: Array) -> str:
    """Canonical text of a matrix [2, 3, 2]: sorted keys, one decimal."""
    matrix = np.round(np.asarray(payoff, np.float64), 1) + 0.0  # no minus zero
    cells = []
    for key in KEYS:
        inside = ", ".join(f'"{p}": {v:.1f}' for p, v in zip(PLAYERS, matrix[GTALIGN.cell(key)], strict=True))
        cells.append(f'"{key}": {{{inside}}}')
    return "{" + ", ".join(cells) + "}"


def analysis_text(cells: Array, action: str) -> str:
    """The shortest analysis: what each action may earn both [A, 2] with its welfare, the best of those so far
    after every further one, and the choice last.

    DA 1.5 -3.5 = 3.12, CQ 0.5 0.5 = 5.50: CQ, AQ 2.5 2.5 = 7.50: choose AQ.
    """
    cells = np.asarray(cells, np.float64)
    text = ""
    for i, (name, (llm, user), product) in enumerate(
        zip(ACTIONS, cells + 0.0, gains_product(cells), strict=True)
    ):
        text += f"{', ' if i else ''}{name} {llm:.1f} {user:.1f} = {np.sqrt(product):.2f}"
        if 0 < i < len(ACTIONS) - 1:
            text += f": {ACTIONS[best_cell(cells[: i + 1])]}"
    return f"{text}: choose {action}."


def settled(text: str) -> list[tuple[int, int]]:
    """Where an analysis settles on an action, for now or in the end: [start, end) of each name in a text."""
    return [match.span(1) for match in _SETTLED.finditer(text)]


def format_chain(thinking: str, payoff: Array | str, analyze: str, response: str) -> str:
    """The four blocks as text; payoff is a matrix [2, 3, 2] or already text."""
    matrix = payoff if isinstance(payoff, str) else payoff_json(payoff)
    blocks = {"thinking": thinking, "payoff": matrix, "analyze": analyze, "response": response}
    return "\n".join(f"<{name}>\n{text}\n</{name}>" for name, text in blocks.items())
