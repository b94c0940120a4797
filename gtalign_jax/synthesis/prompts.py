"""What a language model is told to write one component of a chain."""

from gtalign_jax.game.moves import KEYS
from gtalign_jax.synthesis.ask import ANALYSIS, COMPONENTS, MATRIX, RESPONSE, THINKING, Ask, question

Messages = list[dict[str, str]]

_GAME = """\
A user has asked an assistant something. Their turn is a small game. Next, the user may ask vaguely (VQ) \
or in detail (DQ). The assistant may answer directly (DA), ask one clarifying question (CQ), or answer \
briefly and ask one follow-up question (AQ). You write one part of the assistant's reasoning, and \
nothing else: no title, no tags, no words around it."""

WANTED = {
    THINKING: """\
Write two to five sentences: what each of DA, CQ and AQ would mean here for the user and for the \
assistant. Speak of this very question. No numbers.""",
    MATRIX: f"""\
Write the payoff matrix as one JSON object with the six keys {", ".join(KEYS)}. Each value is {{"LLM": \
x, "user": y}}, numbers from -5 to 5 with one decimal: what that outcome is worth to the assistant and \
to the user. The two differ in every cell, and the numbers follow from the thoughts.""",
    ANALYSIS: """\
Write the analysis: name the outcomes on the Pareto frontier of the matrix, then the one with the \
largest product of both payoffs above -5; on a tie the one with the larger user payoff, then the larger \
LLM payoff. End with the action of that outcome, as `choose DA.`, `choose CQ.` or `choose AQ.`""",
    RESPONSE: """\
Write what the assistant says to the user; it carries out the choice of the analysis. DA: the answer \
only. CQ: exactly one question, no answer. AQ: a short answer and exactly one question. Speak to the \
user, and of neither payoffs nor analysis.""",
}
_NAMES = {THINKING: "Thoughts", MATRIX: "Payoff matrix", ANALYSIS: "Analysis"}


def messages_for(ask: Ask) -> Messages:
    """The chat messages of an ask: the game and what is wanted, then the question and what stands so far."""
    so_far = [f"{_NAMES[name]}:\n{ask.written[name]}" for name in COMPONENTS if name in ask.written]
    content = "\n\n".join([f"The user's request:\n{question(ask.item)}", *so_far, WANTED[ask.component]])
    return [{"role": "system", "content": _GAME}, {"role": "user", "content": content}]
