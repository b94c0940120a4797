"""Score recorded completions: python -m experiments.score IN.jsonl OUT.jsonl --reward=NAME [--reference]

Input lines hold task, completion, ground_truth, and optionally id, judge_text, pareto_judge_text and
extra_info. Each output line is the input line with the reward fields of a rollout line, `judge` and
`errors` (why a completion fails the format). A recorded judge_text is read as the verdict; lines without
one are judged by rules. A missing verdict leaves score, answer, U, L and W null, with the reason in `judge`.
--tasks=module:NAME adds a task of one's own (docs/tasks.md).

The lines may be a run's (RUN/rollouts/SPLIT_STEP.jsonl): then the verdict is the recorded one, and reward and
features are those of the run, so that the numbers come out as they are recorded; --reward changes the reward.

--reference gives what the published code computes, its defects included, on host float64: zeros where
it raises, and a number that is not finite as "nan", "inf" or "-inf". It reads P from pareto_judge_text; our
own definition computes P from <analyze> and the matrix.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.recorded import DEFAULT, ScoreConfig, of_rollout, reward_of_run
from gtalign_jax import jsonl
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.evaluation.published.reward import VARIANTS
from gtalign_jax.evaluation.published.score import score_lines
from gtalign_jax.files import drafts
from gtalign_jax.rewards.features import FeatureBatch, extract
from gtalign_jax.rewards.judges.base import JudgeRequest, Verdict
from gtalign_jax.rewards.judges.rules import judge_by_rules
from gtalign_jax.rewards.judges.verdict import read_verdict
from gtalign_jax.rewards.mutual_welfare import REWARDS, RewardConfig, RewardFn, resolve_reward
from gtalign_jax.rewards.tasks import TASKS, resolve_tasks
from gtalign_jax.rewards.tasks.task import Task, Tasks
from gtalign_jax.run import progress
from gtalign_jax.types import Features, Reward

Line = Mapping[str, Any]
Scorer = Callable[[Sequence[Line]], list[dict[str, Any]]]


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("input", metavar="IN.jsonl", help="JSON lines to read")
    parser.add_argument("output", metavar="OUT.jsonl", help="JSON lines to write")
    names = f"one of {', '.join(REWARDS)}, or module:function (with --reference: {', '.join(VARIANTS)})"
    parser.add_argument("--reward", default="", help=f"{names}; default: a run's own, else {DEFAULT}")
    parser.add_argument("--reference", action="store_true", help="as the published code computes it")
    parser.add_argument("--tasks", default="", help="tasks of one's own beside ours, module:NAME by comma")
    parser.add_argument("--batch_size", type=int, default=1024, help="lines in memory at a time")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    if flags.batch_size < 1:
        raise UserError(f"--batch_size={flags.batch_size}: must be at least 1")
    tasks = TASKS if flags.reference else {**TASKS, **own_tasks(flags.tasks)}
    config = reward_of_run(flags.input, flags.reward)
    scorer = reference(config.fn) if flags.reference else corrected(config, tasks)
    lines = checked_lines(flags.input, needs_judge=flags.reference, tasks=tasks)
    by_rules = 0
    drafts.check(flags.output, "OUT.jsonl", flags.input)
    with jsonl.draft(flags.output) as sink:
        for batch in progress.counted(progress.batches(lines, flags.batch_size), "score"):
            for (line, seen), fields in zip(batch, scorer([seen for _, seen in batch]), strict=True):
                sink.write(jsonl.encode({**line, **fields}) + "\n")
                by_rules += seen.get("judge_text") is None and "verdict" not in seen
    if by_rules:
        print(f"score: {by_rules} lines have no judge_text and were judged by rules", file=sys.stderr)


def own_tasks(names: str) -> dict[str, Task]:
    """The tasks that a flag names by comma; UserError for one that there is not."""
    return resolve_tasks([name for name in names.split(",") if name], {}, "--tasks")


def checked_lines(path: str, needs_judge: bool, tasks: Tasks = TASKS) -> Iterator[tuple[Line, Line]]:
    """Each line of a file, and it as it is scored, with the fields of the right type; UserError names line
    and field."""
    for number, whole in jsonl.stream(path):
        where = f"{path}:{number}"
        line = of_rollout(whole, where) if "output" in whole and "completion" not in whole else whole
        if line.get("task") not in list(tasks):
            raise UserError(
                f"{where}: task={str(line.get('task'))[:40]!r}: must be one of {', '.join(tasks)}"
            )
        for field in ("completion", "ground_truth"):
            if not isinstance(line.get(field), str):
                raise UserError(f"{where}: {field} must be a string")
        for field in ("judge_text", "pareto_judge_text"):
            if not isinstance(line.get(field), str | None):
                raise UserError(f"{where}: {field} must be a string, null or left out")
        if not isinstance(line.get("extra_info"), dict | None):
            raise UserError(f"{where}: extra_info must be an object, null or left out")
        if needs_judge and line.get("judge_text") is None:
            raise UserError(f"{where}: judge_text is missing; --reference needs the judge's recorded text")
        yield whole, line


def reference(name: str) -> Scorer:
    """The published reward of this name."""
    if name not in VARIANTS:
        raise UserError(f"--reward={name}: the published code has only {', '.join(VARIANTS)}")

    def scorer(lines: Sequence[Line]) -> list[dict[str, Any]]:
        return [
            {key: _spelled(value) for key, value in fields.items()} for fields in score_lines(lines, name)
        ]

    return scorer


def _spelled(value: Any) -> Any:
    """JSON has no NaN and no infinity, and these are results here, not missing values."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclasses.dataclass(frozen=True)
class RecordedItem:
    """What `extract` asks of an item. intent: the row of the line, by which the judge finds it again."""

    task: str
    intent: str
    ground_truth: str


def recorded_judge(lines: Sequence[Line], tasks: Tasks, requests: Sequence[JudgeRequest]) -> list[Verdict]:
    """The verdicts that stand in the lines that the requests name, or that their judge_text holds; by rules
    where there is none."""
    verdicts = []
    for request in requests:
        line = lines[int(request.question)]
        if "verdict" in line:
            verdicts.append(line["verdict"])
            continue
        if line.get("judge_text") is not None:
            verdicts.append(read_verdict(line["judge_text"], request.task, tasks))
            continue
        intent = str((line.get("extra_info") or {}).get("single_turn_prompt") or "")
        verdicts += judge_by_rules([dataclasses.replace(request, question=intent, item=None)], tasks)
    return verdicts


def corrected(config: ScoreConfig, tasks: Tasks = TASKS) -> Scorer:
    """Our definitions: the jitted reward of this config on the features of the lines of these tasks."""
    reward_fn = resolve_reward(config.fn, "--reward")

    def scorer(lines: Sequence[Line]) -> list[dict[str, Any]]:
        items = [RecordedItem(line["task"], str(i), line["ground_truth"]) for i, line in enumerate(lines)]
        completions = [line["completion"] for line in lines]
        judge = functools.partial(recorded_judge, lines, tasks)
        batch = extract(completions, items, judge, config.features, tasks=tasks)
        if config.features.frontier == "judge":  # whose verdict stands in the line
            found = np.array([line.get("pareto_score") or 0.0 for line in lines], np.float32)
            batch = dataclasses.replace(batch, features=batch.features.replace(frontier=found))
        features = jax.tree.map(_padded, batch.features)
        return fields_of(batch, jax.device_get(compute(reward_fn, features, config.reward)))

    return scorer


@functools.partial(jax.jit, static_argnums=(0, 2))
def compute(reward_fn: RewardFn, features: Features, config: RewardConfig) -> Reward:
    """The jitted reward of features [B]; UserError when the function does not return a Reward."""
    reward = reward_fn(features, config)
    if not isinstance(reward, Reward):
        name = getattr(reward_fn, "__name__", str(reward_fn))
        raise UserError(f"--reward: {name} returned {type(reward).__name__}; it must return a Reward")
    return reward


def _padded(column: np.ndarray) -> np.ndarray:
    """Rows up to a power of two, so that a last short batch seldom compiles anew."""
    rows = 1 << (len(column) - 1).bit_length()
    return np.pad(column, [(0, rows - len(column)), *[(0, 0)] * (column.ndim - 1)])


def fields_of(batch: FeatureBatch, reward: Reward) -> list[dict[str, Any]]:
    """The output fields of each line; what needs a verdict is null where none could be had."""
    features, rows = batch.features, []
    for i, verdict in enumerate(batch.verdicts):
        user, llm = float(reward.user[i]), float(reward.llm[i])
        needs_verdict = {
            "score": float(reward.welfare[i]),
            "answer_reward": float(batch.answer[i]),
            "user_reward": user,
            "llm_reward": llm,
            "utility": math.sqrt(user * llm) if user * llm >= 0 else None,
            "reward_gap": abs(user - llm),
        }
        if not features.valid[i]:
            needs_verdict = dict.fromkeys(needs_verdict)
        rows.append(
            needs_verdict
            | {
                "format_reward": float(features.format_ok[i]),
                "payoff_reward": float(reward.parts["payoff"][i]) if "payoff" in reward.parts else None,
                "pareto_score": float(features.frontier[i]),
                "action": batch.action[i],
                "judge": {"verdict": verdict.score, "reason": verdict.reason},
                "errors": list(batch.chains[i].errors),
            }
        )
    return rows


if __name__ == "__main__":
    main()
