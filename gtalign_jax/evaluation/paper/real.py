"""What became of a real model: its answers under two judges, by method and task, and how training went."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gtalign_jax import jsonl
from gtalign_jax.evaluation.bootstrap import task_of
from gtalign_jax.evaluation.paired import cohens_kappa
from gtalign_jax.evaluation.paper import figures, tables
from gtalign_jax.evaluation.paper.entries import ALIGNED, SFT, Entry, Method
from gtalign_jax.game.moves import ACTIONS

PLAIN, USER = "plain", "user"  # methods beside those that are named by their stage
FIRST, SECOND = "offline", "on the mesh"  # judges
Lines = list[dict[str, Any]]
Answers = dict[str, dict[str, list[Lines]]]
"""Of each judge and method, the judged lines of each seed's evaluation."""
CURVES = ("reward/welfare", "reward/answer", "reward/format", "fluency/mean", "kl/ref")
_TABLES = (("compare", "utility"), ("by_task", "utility"), ("by_task", "answer_reward"))
_SHOWN = ("utility", "user_reward", "llm_reward", "answer_reward", "format_reward", "n_tokens", *ACTIONS)
_LAST = 10  # steps at either end of training whose means are compared
N_CHAINS = 20
_RIVALS = {SFT: "the cold start", USER: "the user's reward alone"}


def write_results(answers: Answers, training: Mapping[str, Lines], folder: pathlib.Path) -> str:
    """Write results.md, results.json, a figure a judge, curves.svg and chains.md; returns the text.

    training: the metrics of each run's alignment.
    """
    parts, found = ["# A real model under two judges\n"], {}
    for judge, runs in answers.items():
        for kind, metric in _TABLES:
            entry = _entry(runs, kind, metric)
            table = tables.make_table(entry, runs)
            name = f"{metric}{', by task' if kind == 'by_task' else ''}, judged {judge}"
            parts.append(f"## {name}\n\n{tables.format_table(entry, table)}")
            found[name] = {"rows": table.rows, "verdict": table.verdict}
            found[name]["differences"] = {rival: d._asdict() for rival, d in table.differences.items()}
            if kind == "compare":
                figures.save_table(entry, table, folder / f"judged_{judge.replace(' ', '_')}.svg")
    parts += [agreement(answers), changes(training)]
    text = "\n".join(parts)
    jsonl.write_atomic(folder / "results.md", text)
    jsonl.write_atomic(folder / "results.json", json.dumps(jsonl.plain(found), indent=1) + "\n")
    jsonl.write_atomic(folder / "chains.md", picked(answers[FIRST]))
    if training:
        figures.save_training(training, CURVES, folder / "curves.svg")
    return text


def _entry(runs: Mapping[str, Sequence[Lines]], kind: str, metric: str) -> Entry:
    """What is claimed of the methods that are there."""
    rivals = tuple(name for name in _RIVALS if name in runs) if ALIGNED in runs else ()
    claim = f"alignment on mutual welfare beats {' and '.join(_RIVALS[name] for name in rivals)}"
    ours = ALIGNED if ALIGNED in runs else next(iter(runs))
    methods = tuple(Method(name) for name in runs)
    return Entry(
        "real",
        claim if rivals else "none, for nothing is aligned yet",
        kind,
        methods,
        ours,
        rivals,
        metric,
        _SHOWN,
    )


def agreement(answers: Answers) -> str:
    """Whether the judges say the same of an answer: Cohen's kappa of "over half of the scale", by task."""
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for name, seeds in answers[FIRST].items():
        for first, second in zip(seeds, answers[SECOND][name], strict=True):
            for a, b in zip(first, second, strict=True):
                if a["answer_reward"] is not None and b["answer_reward"] is not None:
                    pairs.setdefault(task_of(a), []).append(
                        (a["answer_reward"] > 0.5, b["answer_reward"] > 0.5)
                    )
    lines = [
        "## Agreement of the judges",
        "",
        "| task | answers | agree | Cohen's kappa |",
        "|---|---|---|---|",
    ]
    for task, found in pairs.items():
        kappa = cohens_kappa(*zip(*found, strict=True))
        share = float(np.mean([a == b for a, b in found]))
        lines.append(f"| {task} | {len(found)} | {share:.2f} | {kappa:.2f} |")
    return "\n".join([*lines, ""])


def changes(training: Mapping[str, Lines]) -> str:
    """The first and the last steps of each alignment."""
    lines = ["## Training", "", f"| run | {' | '.join(CURVES)} |", "|---" * (len(CURVES) + 1) + "|"]
    for name, steps in training.items():
        cells = []
        for metric in CURVES:
            values = [step[metric] for step in steps if step.get(metric) is not None]
            ends = (float(np.mean(part)) for part in (values[:_LAST], values[-_LAST:])) if values else ()
            cells.append(" to ".join(f"{end:.3f}" for end in ends) or "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = f"Means over the first and the last {_LAST} steps. fluency/mean: nats a token, by the reference."
    return "\n".join([*lines, "", note, ""])


def curves(runs: Iterable[pathlib.Path]) -> dict[str, Lines]:
    """{run: metrics of its alignment's steps}, of runs that have some."""
    found: dict[str, Lines] = {}
    for run in runs:
        steps = [line for line in jsonl.read(run / "metrics.jsonl") if line["phase"] == "align"]
        found |= {run.name: steps} if steps else {}
    return found


def picked(runs: Mapping[str, Sequence[Lines]]) -> str:
    """Chains to read, picked by a rule and not by hand: of the first seed's aligned answers, in the order of
    the held-out questions, as many as are wanted at even distances, from the first."""
    lines = runs.get(ALIGNED, next(iter(runs.values())))[0]
    count = min(N_CHAINS, len(lines))
    texts = ["# Chains", "", f"{count} of {len(lines)} answers, at even distances from the first on.", ""]
    for line in (lines[i * len(lines) // count] for i in range(count)):
        numbers = ", ".join(
            f"{name} {'-' if line[metric] is None else format(line[metric], '.2f')}"
            for name, metric in (("W", "utility"), ("answer", "answer_reward"), ("format", "format_reward"))
        )
        texts += [
            f"**{task_of(line)}** {numbers}",
            "",
            *_quoted(line["input"]),
            "",
            *_quoted(line["output"]),
            "",
        ]
    return "\n".join(texts)


def _quoted(text: str) -> list[str]:
    """A text of others, which no Markdown in it can end."""
    return [f"    {line}" for line in text.splitlines()]
