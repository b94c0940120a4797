"""Rollout dumps: `rollouts/<split>_<step>.jsonl` in the workdir, one completion a line.

The split is `train` for the completions a step was trained on, and the model's name in `summary.json`
(`sft`, `aligned`) for its held-out evaluation.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gtalign_jax import jsonl
from gtalign_jax.rewards.judges.base import Verdict

Dump = tuple[str, int, pathlib.Path]  # split, step, path
_NAME = re.compile(r"(?P<split>[A-Za-z0-9][A-Za-z0-9._-]*)_(?P<step>\d+)\.jsonl")


@dataclasses.dataclass(frozen=True)
class RolloutLine:
    """One completion and all that was measured on it.

    input: the rendered prompt; output: the completion; gts: the ground truth; source: the dataset's name
    as in its rows. score: what training maximises; utility: the welfare W; format_reward: F; payoff_reward:
    M; pareto_score: P. action: DA, CQ, AQ or None. n_tokens: completion tokens. seen: the prompt stands in
    the training data too. task: its name, where the source does not say it; id: what the record calls itself.
    """

    input: str
    output: str
    gts: str
    source: str
    step: int
    score: float
    answer_reward: float
    format_reward: float
    payoff_reward: float
    pareto_score: float
    user_reward: float
    llm_reward: float
    utility: float
    action: str | None
    n_tokens: int
    verdict: Verdict
    seen: bool = False
    task: str = ""
    id: str = ""

    def fields(self) -> dict[str, Any]:
        """The line as it is written, with reward_gap = |U - L|; `seen`, `task` and `id` only where they say
        something. A number that is not finite (no verdict) is null."""
        line = {name: getattr(self, name) for name in _BEFORE_GAP}
        line |= {"reward_gap": abs(self.user_reward - self.llm_reward), "action": self.action}
        judged = self.verdict
        line["n_tokens"] = self.n_tokens
        line["judge"] = {"verdict": judged.score, "reason": judged.reason, "latency_s": judged.latency_s}
        said = {name: value for name in ("seen", "task", "id") if (value := getattr(self, name))}
        return jsonl.plain(line | said)


_NAMES = [field.name for field in dataclasses.fields(RolloutLine)]
_BEFORE_GAP = _NAMES[: _NAMES.index("action")]
# What every line holds.
FIELDS = frozenset(_BEFORE_GAP) | {"reward_gap", "action", "n_tokens", "judge"}


def check_split(split: str) -> None:
    """ValueError for a name that no rollout file could have."""
    if not _NAME.fullmatch(f"{split}_0.jsonl"):
        raise ValueError(f"{split!r}: must be letters, digits, '.', '-' and '_', a letter or digit first")


def write_rollouts(
    workdir: pathlib.Path, split: str, step: int, lines: Iterable[Mapping[str, Any]]
) -> pathlib.Path:
    """Write, or replace, the dump of one split and step; returns its path."""
    check_split(split)
    path = workdir / "rollouts" / f"{split}_{step}.jsonl"
    jsonl.write(path, lines)
    return path


def list_rollouts(workdir: pathlib.Path) -> list[Dump]:
    """Every dump, by split, then by step."""
    matches = ((_NAME.fullmatch(path.name), path) for path in (workdir / "rollouts").glob("*.jsonl"))
    return sorted((m["split"], int(m["step"]), path) for m, path in matches if m)


def newest(dumps: Sequence[Dump], split: str) -> pathlib.Path | None:
    """The dump of a split's last step among those of `list_rollouts`, where there is one."""
    return next((path for name, _, path in reversed(dumps) if name == split), None)
