"""Rollout dumps: `rollouts/<split>_<step>.jsonl` in the workdir, one completion a line.

The split is `train` for the completions a step was trained on, and the model's name in `summary.json`
(`sft`, `aligned`) for its held-out evaluation.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from gtalign_jax import jsonl
from gtalign_jax.rewards.judges.base import Verdict

_NAME = re.compile(r"(?P<split>[A-Za-z0-9][A-Za-z0-9._-]*)_(?P<step>\d+)\.jsonl")


def rollout_line(
    *,
    input: str,
    output: str,
    gts: str,
    source: str,
    step: int,
    score: float,
    answer_reward: float,
    format_reward: float,
    payoff_reward: float,
    pareto_score: float,
    user_reward: float,
    llm_reward: float,
    utility: float,
    action: str | None,
    n_tokens: int,
    verdict: Verdict,
    seen: bool = False,
) -> dict[str, Any]:
    """One completion and all that was measured on it.

    input: the rendered prompt; output: the completion; gts: the ground truth; source: the dataset's name
    as in its rows. score: what training maximises; utility: the welfare W; reward_gap: |U - L|;
    format_reward: F; payoff_reward: M; pareto_score: P. action: DA, CQ, AQ or None. n_tokens: completion
    tokens. seen: the prompt stands in the training data too (written only then). A number that is not
    finite (no verdict) is written as null.
    """
    line = jsonl.plain(
        {
            "input": input,
            "output": output,
            "gts": gts,
            "source": source,
            "step": int(step),
            "score": score,
            "answer_reward": answer_reward,
            "format_reward": format_reward,
            "payoff_reward": payoff_reward,
            "pareto_score": pareto_score,
            "user_reward": user_reward,
            "llm_reward": llm_reward,
            "utility": utility,
            "reward_gap": abs(user_reward - llm_reward),
            "action": action,
            "n_tokens": int(n_tokens),
            "judge": {"verdict": verdict.score, "reason": verdict.reason, "latency_s": verdict.latency_s},
        }
    )
    return line | {"seen": True} if seen else line


def write_rollouts(
    workdir: pathlib.Path, split: str, step: int, lines: Iterable[Mapping[str, Any]]
) -> pathlib.Path:
    """Write, or replace, the dump of one split and step; returns its path."""
    name = f"{split}_{step}.jsonl"
    path = workdir / "rollouts" / name
    if not _NAME.fullmatch(name):
        raise ValueError(f"{split!r}: a split is letters, digits, '.', '-' and '_'")
    jsonl.write(path, lines)
    return path


def list_rollouts(workdir: pathlib.Path) -> list[tuple[str, int, pathlib.Path]]:
    """(split, step, path) of every dump, by split, then by step."""
    matches = ((_NAME.fullmatch(path.name), path) for path in (workdir / "rollouts").glob("*.jsonl"))
    return sorted((m["split"], int(m["step"]), path) for m, path in matches if m)
