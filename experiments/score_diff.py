"""Where our rewards differ from the published code's, and by how much: a table over recorded completions.

    python -m experiments.score_diff IN.jsonl [IN.jsonl ...] [--reward=cobb_douglas]

Lines are those of `experiments.score`, each with its judge_text. Every line is scored both ways; it is
counted in the row of the first term, in the order of the table, in which the two readings differ. W is the
mean score of that row's lines, with 0 where a side gives none. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import score
from experiments.recorded import ScoreConfig
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.evaluation.published.reward import FRONTIER, VARIANTS
from gtalign_jax.evaluation.published.score import PublishedError, PublishedLine, read_line

TOLERANCE = 1e-6

ROWS = {
    "raises": "the published code raises, which its manager turns into zeros",
    "verdict": "no verdict, or one off its scale: we drop the sample, they score it",
    "void": "blocks repeated or nested: they take the first, we take none",
    "numbers": "NaN, infinite, boolean, huge or repeated payoffs: they accept them, we do not",
    "spelling": "a matrix in a spelling that only one side reads",
    "format": "F: text around the chain",
    "safety": "Q of safety: complying with harm earns the user nothing from us",
    "writing": "Q of writing: BLEU over words, not over characters",
    "read": "the verdict is read differently (first or last mark, other numbers)",
    "tenth": "M: a cell whose payoffs differ by exactly a tenth",
    "domain": "out-of-domain tasks: their evaluation variant keeps the training L, without P",
    "frontier": "P: computed from the matrix, not judged",
    "other": "anything else",
    "same": "no difference above 1e-6",
}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="IN.jsonl")
    parser.add_argument("--reward", default="cobb_douglas", help=f"one of {', '.join(VARIANTS)}")
    flags = parser.parse_args(argv)
    published, ours = score.reference(flags.reward), score.corrected(ScoreConfig(flags.reward))
    lines = [line for path in flags.inputs for _, line in score.checked_lines(path, needs_judge=True)]
    if not lines:
        raise UserError(f"{flags.inputs[0]}: no lines to compare")
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in ROWS}
    for line, theirs, mine in zip(lines, published(lines), ours(lines), strict=True):
        pair = (_number(theirs["score"]), _number(mine["score"]))
        rows[_first_difference(line, flags.reward, theirs, mine, pair)].append(pair)
    sys.stdout.write(table(rows, len(lines)))


def table(rows: Mapping[str, list[tuple[float, float]]], total: int) -> str:
    """Markdown: one row a kind of difference that occurs."""
    text = "| what differs | lines | W published | W ours |\n|---|---|---|---|\n"
    for name, pairs in rows.items():
        if pairs:
            theirs, mine = np.mean(pairs, axis=0)
            text += f"| {ROWS[name]} | {len(pairs)} | {theirs:.3f} | {mine:.3f} |\n"
    theirs, mine = np.mean([pair for pairs in rows.values() for pair in pairs], axis=0)
    return text + f"| all | {total} | {theirs:.3f} | {mine:.3f} |\n"


def _number(value: Any) -> float:
    """A score as a finite float; none, and what the published code spells as nan or inf, is 0."""
    return float(value) if isinstance(value, float | int) else 0.0


def _first_difference(
    line: Mapping[str, Any], reward: str, theirs: Mapping, mine: Mapping, pair: tuple[float, float]
) -> str:
    """The row of ROWS a line belongs to."""
    if mine["judge"]["verdict"] is None:
        return "verdict"
    if abs(pair[0] - pair[1]) <= TOLERANCE and not isinstance(theirs["score"], str):
        return "same"
    try:
        reading = read_line(line, reward)
    except PublishedError:
        return "raises"
    if bool(reading.measures["due"]) != (pair[1] > 0):
        return _unpaid(mine["errors"])
    return _first_term(line["task"], reward, reading, mine)


def _unpaid(errors: list[str]) -> str:
    """Why only one side pays: from our own report."""
    text = " ".join(errors)
    if "stands more than once" in text or "void" in text or "inside it" in text:
        return "void"
    known = ("is not a number within", "times", "once each", "characters, over")
    return "numbers" if any(part in text for part in known) else "spelling"


def _first_term(task: str, reward: str, reading: PublishedLine, mine: Mapping[str, Any]) -> str:
    """The first term in which two paid readings differ."""
    measures = reading.measures
    if measures["format_ok"] != mine["format_reward"]:
        return "format"
    if task in ("wildguard", "advbench"):
        return "safety"
    if task == "medium":
        return "writing"
    if measures["answer"] != mine["answer_reward"]:
        return "read"
    if abs(measures["payoff"] - mine["payoff_reward"]) > TOLERANCE:
        return "tenth"
    if reward == FRONTIER and not measures["in_domain"]:
        return "domain"
    return "frontier" if measures["frontier"] != mine["pareto_score"] else "other"


if __name__ == "__main__":
    main()
