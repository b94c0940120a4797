"""A written matrix read from a cut sequence, and another one put in its place: token ids, not text."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gtalign_jax.chain.parse import parse_payoff, to_array
from gtalign_jax.chain.prompt import payoff_json
from gtalign_jax.chain.solver import solver_analysis
from gtalign_jax.errors import UserError
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.engine import Engine

OPEN, CLOSE = "<payoff>", "</payoff>"
ANALYZE = MODEL, SOLVER = ("model", "solver")  # who writes <analyze> after an edited matrix
# What becomes of a matrix that cannot be read.
UNUSABLE = ERROR, AGAIN, GRAMMAR, UNSTEERED = ("error", "again", "grammar", "unsteered")
TRIES = 2  # first passes of a prompt, with AGAIN and GRAMMAR


@dataclasses.dataclass(frozen=True)
class Splice:
    """A cut sequence with its matrix replaced.

    prefix: its tokens, with which the continued sequence begins, token for token. kept: how many of them
    are the model's own, before the matrix.
    """

    prefix: tuple[int, ...]
    kept: int


def read_payoff(text: str) -> np.ndarray:
    """The matrix float64 [U, A, 2] of a text that ends with its <payoff> block."""
    inside, closed, _ = text.partition(CLOSE)
    _, opened, block = inside.rpartition(OPEN)
    payoff, errors = parse_payoff(block) if closed and opened else (None, ["no payoff block"])
    if payoff is None:
        tail = " ".join(inside.split())[-120:]
        raise UserError(f"the model wrote no usable matrix to edit ({errors[0]}); its text ends {tail!r}")
    return to_array(payoff)


def splice_payoff(
    engine: Engine, token_ids: Sequence[int], payoff: np.ndarray, analyze: str = MODEL
) -> Splice:
    """Replace the matrix of a sequence that ends with </payoff> by payoff [U, A, 2].

    Only the tokens that touch the matrix are made again; those before it are kept as they are. With analyze
    SOLVER the analysis that follows from the matrix stands after it, up to the opening of <response>.
    """
    text = engine_lib.decode_tokens(engine, token_ids)
    first, following = splice_text(text, payoff, analyze)
    kept = len(token_ids)
    while not text[:first].startswith(head := engine_lib.decode_tokens(engine, token_ids[:kept])):
        kept -= 1
    if kept == 0:
        raise UserError("the matrix begins inside the first token, so there is no sequence to resume")
    made = engine.tokenizer(text[len(head) : first] + following, add_special_tokens=False)["input_ids"]
    return Splice((*map(int, token_ids[:kept]), *made), kept)


def splice_text(text: str, payoff: np.ndarray, analyze: str = MODEL) -> tuple[int, str]:
    """`splice_payoff` of text: how many of its characters are kept, and what stands after them."""
    close = text.index(CLOSE)
    inside = text.rindex(OPEN, 0, close) + len(OPEN)
    block = text[inside:close]
    first = inside + len(block) - len(block.lstrip())
    after = inside + len(block.rstrip())
    matrix = payoff_json(payoff)
    if analyze == MODEL:
        return first, matrix + text[after:]
    tags = text[after : close + len(CLOSE)]
    return first, f"{matrix}{tags}\n<analyze>\n{solver_analysis(payoff)}\n</analyze>\n<response>\n"
