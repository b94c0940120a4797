"""Recorded completions as the sample browser shows them: blocks, matrix, frontier, chosen cell."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gtalign_jax import jsonl
from gtalign_jax.chain.parse import BLOCKS, Chain, parse_chain, payoff_array
from gtalign_jax.evaluation.bootstrap import task_of
from gtalign_jax.evaluation.report.recorded import RecordedRun
from gtalign_jax.game.moves import ACTIONS, GTALIGN
from gtalign_jax.game.payoff import cell_welfare, pareto_frontier, welfare_optimal

SCORES = (
    "utility",
    "user_reward",
    "llm_reward",
    "answer_reward",
    "format_reward",
    "payoff_reward",
    "pareto_score",
)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """steps: dumps of a split, evenly over the run. each: samples of one split, step and task.

    max_chars: length after which a text is cut, with a note.
    """

    steps: int = 6
    each: int = 10
    max_chars: int = 20_000


def pick_samples(run: RecordedRun, config: SampleConfig = SampleConfig()) -> list[dict[str, Any]]:
    """The browser's samples, training splits by step, then the evaluated models in table order."""
    order = {model: i for i, model in enumerate(run.models)}
    by_split = itertools.groupby(run.dumps, key=lambda dump: dump[0])
    dumps = {split: list(part) for split, part in by_split}
    found = []
    for split in sorted(dumps, key=lambda s: order.get(s, -1)):
        for index in _spread(len(dumps[split]), config.steps):
            _, step, path = dumps[split][index]
            found += [(split, step, row) for row in _first_of_each(jsonl.read(path), config.each)]
    return describe(found, config.max_chars)


def count_lines(run: RecordedRun) -> int:
    """How many completions the run recorded."""
    return sum(path.read_bytes().count(b"\n") for _, _, path in run.dumps)


def _spread(n: int, k: int) -> list[int]:
    """At most k indices of range(n), evenly spread, the first and the last among them."""
    return sorted(set(np.linspace(0, n - 1, min(n, k)).round().astype(int).tolist()))


def _first_of_each(rows: Sequence[Mapping[str, Any]], each: int) -> list[Mapping[str, Any]]:
    seen: dict[str, int] = {}
    kept = []
    for row in rows:
        task = task_of(row)
        seen[task] = seen.get(task, 0) + 1
        if seen[task] <= each:
            kept.append(row)
    return kept


def describe(found: Sequence[tuple[str, int, Mapping[str, Any]]], max_chars: int) -> list[dict[str, Any]]:
    """Samples of (split, step, rollout line); texts are cut at `max_chars`."""
    chains = [parse_chain(row["output"]) for _, _, row in found]
    actions = [row.get("action") for _, _, row in found]
    matrices = describe_matrices(*_stack(chains), actions)
    return [
        _sample(*item, chain, matrix, max_chars)
        for item, chain, matrix in zip(found, chains, matrices, strict=True)
    ]


def _stack(chains: Sequence[Chain]) -> tuple[np.ndarray, np.ndarray]:
    parsed = [payoff_array(chain) for chain in chains]
    payoff = np.array([matrix for matrix, _ in parsed]).reshape(-1, *GTALIGN.shape)
    return payoff, np.array([ok for _, ok in parsed], bool)


def describe_matrices(
    payoff: np.ndarray, ok: np.ndarray, actions: Sequence[str | None]
) -> list[dict[str, Any] | None]:
    """payoff [B, U, A, 2], ok [B] → per sample {payoff, welfare, frontier, chosen} as lists, or None.

    chosen: [user move, action] of the cell the chosen action leads to when the user replies to the
    welfare of both; None when no action was named.
    """
    if not len(payoff):
        return []
    payoff = np.asarray(payoff, np.float64)
    welfare, best = np.asarray(cell_welfare(payoff)), np.asarray(pareto_frontier(payoff))
    column = np.array([ACTIONS.index(a) if a in ACTIONS else 0 for a in actions])
    chosen_column = np.take_along_axis(payoff, column[:, None, None, None], axis=2)
    move = np.asarray(welfare_optimal(chosen_column)[0])
    return [
        {
            "payoff": payoff[i].tolist(),
            "welfare": welfare[i].round(3).tolist(),
            "frontier": best[i].tolist(),
            "chosen": [int(move[i]), int(column[i])] if actions[i] in ACTIONS else None,
        }
        if ok[i]
        else None
        for i in range(len(payoff))
    ]


def _sample(
    split: str, step: int, row: Mapping[str, Any], chain: Chain, matrix: dict[str, Any] | None, max_chars: int
) -> dict[str, Any]:
    texts = (chain.thinking, chain.payoff_text, chain.analyze, chain.response)
    return {
        "split": split,
        "step": step,
        "task": task_of(row),
        "prompt": cut(row["input"], max_chars),
        "truth": cut(str(row.get("gts", "")), max_chars),
        "blocks": {
            name: cut(text, max_chars) for name, text in zip(BLOCKS, texts, strict=True) if text is not None
        },
        # The text as written is kept where the blocks do not hold all of it.
        "raw": None if chain.format_ok else cut(row["output"], max_chars),
        "errors": list(chain.errors),
        "matrix": matrix,
        "action": row.get("action"),
        "scores": {name: row.get(name) for name in SCORES},
        "tokens": row.get("n_tokens"),
        "judge": row.get("judge"),
    }


def cut(text: str, max_chars: int) -> str:
    """The text, or its beginning and a note."""
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]}\n… ({len(text) - max_chars:,} more characters)"


def steering_examples(lines: Sequence[Mapping[str, Any]], max_chars: int = 20_000) -> list[dict[str, Any]]:
    """Lines of steering.jsonl as the page shows them, one a task."""
    by_task = {line["task"]: line for line in reversed(lines)}
    found = []
    for line in reversed(by_task.values()):
        sides = [line["before"], line["after"]]
        payoff = np.array([side["payoff"] for side in sides], np.float64)
        actions = [side["action"] for side in sides]
        matrices = describe_matrices(payoff, np.array([True, True]), actions)
        shown = {k: line.get(k) for k in ("task", "policy", "price")} | {
            "prompt": cut(line["prompt"], max_chars)
        }
        for name, side, matrix in zip(("before", "after"), sides, matrices, strict=True):
            shown[name] = {"action": side["action"], "matrix": matrix, **_answer(side["text"], max_chars)}
        found.append(shown)
    return found


def _answer(text: str, max_chars: int) -> dict[str, str]:
    """The blocks after the matrix, or the whole text where it has none."""
    chain = parse_chain(text)
    return {
        "analyze": cut(chain.analyze or "", max_chars),
        "response": cut(text if chain.response is None else chain.response, max_chars),
    }
