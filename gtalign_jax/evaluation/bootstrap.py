"""Means with 95 % bootstrap intervals: the numbers of `summary.json` and the table on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gtalign_jax.rewards.tasks import task_of_source

# Fields of a rollout line that are averaged; `utility` is the welfare W.
METRICS = (
    "score",
    "utility",
    "user_reward",
    "llm_reward",
    "answer_reward",
    "format_reward",
    "payoff_reward",
    "pareto_score",
    "reward_gap",
    "n_tokens",
)
SHOWN = ("utility", "user_reward", "llm_reward", "answer_reward", "format_reward", "n_tokens")
OVERALL = "overall"
MIN_PROMPTS = 20  # resampling fewer says little about prompts that were not drawn

Estimate = dict[str, float]
Summary = dict[str, dict[str, dict[str, Estimate]]]


def bootstrap_means(
    values: np.ndarray, *, clusters: Sequence[Any] | None = None, n_boot: int = 2000, seed: int = 0
) -> list[Estimate]:
    """Mean of each column of `values` [n, M] and its 95 % percentile bootstrap interval.

    An estimate is {mean, lo, hi, n, clusters}: n counts the values, clusters those that hold one.
    clusters [n]: hashable labels; values of one label are drawn together (several completions of one
    prompt are not independent). A resample draws K of the K clusters with replacement, the same for all
    columns; its mean is the ratio of the summed values to the summed counts, so clusters may differ in size.
    Values that are NaN are missing: they count neither in the mean nor in n. With no value at all, mean, lo
    and hi are NaN.
    """
    present = ~np.isnan(values)
    label = np.arange(len(values)) if clusters is None else _labels(clusters)
    k = int(label.max()) + 1 if len(label) else 0
    total, count = np.zeros((k, values.shape[1])), np.zeros((k, values.shape[1]))
    np.add.at(total, label, np.where(present, values, 0.0))
    np.add.at(count, label, present)
    means = _resampled_means(total, count, n_boot, seed)
    return [_estimate(total[:, m].sum(), count[:, m], means[:, m]) for m in range(values.shape[1])]


def _resampled_means(total: np.ndarray, count: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """Means [n_boot, M] of resampled clusters; total, count: [K, M]. NaN where a resample has no value."""
    k = len(total)
    if k == 0:
        return np.full((n_boot, total.shape[1]), np.nan)
    rng = np.random.default_rng(seed)
    means = []
    rows = max(1, 4_000_000 // k)  # bounds the memory of the drawn multiplicities
    for start in range(0, n_boot, rows):
        n = min(rows, n_boot - start)
        draws = rng.integers(k, size=(n, k)) + k * np.arange(n)[:, None]
        times = np.bincount(draws.ravel(), minlength=n * k).reshape(n, k).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append((times @ total) / (times @ count))
    return np.concatenate(means)


def _estimate(total: float, count: np.ndarray, resampled: np.ndarray) -> Estimate:
    n, clusters = int(count.sum()), int((count > 0).sum())
    if n == 0:
        return {"mean": float("nan"), "lo": float("nan"), "hi": float("nan"), "n": 0, "clusters": 0}
    lo, hi = np.nanpercentile(resampled, [2.5, 97.5])
    return {"mean": float(total / n), "lo": float(lo), "hi": float(hi), "n": n, "clusters": clusters}


def _labels(clusters: Sequence[Any]) -> np.ndarray:
    """Labels as 0..K-1 in order of first appearance."""
    seen: dict[Any, int] = {}
    return np.array([seen.setdefault(c, len(seen)) for c in clusters], np.int64)


def task_of(row: Mapping[str, Any]) -> str:
    """The task of a rollout line: the one it names, or the published one that its dataset belongs to."""
    return row.get("task") or task_of_source(row["source"])


def summary_table(
    rows_by_model: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Summary:
    """`{model: {task | "overall": {metric: {mean, lo, hi, n, clusters}}}}` from rollout lines.

    Completions with the same input form one cluster. `overall` pools the lines of all tasks. A task some
    of whose prompts also stand in the training data has a second entry, `TASK (unseen)`, without them.
    """
    return {model: _model_summary(rows, n_boot, seed) for model, rows in rows_by_model.items()}


def _model_summary(
    rows: Sequence[Mapping[str, Any]], n_boot: int, seed: int
) -> dict[str, dict[str, Estimate]]:
    tasks = np.array([task_of(row) for row in rows], dtype=object)
    prompts = np.array([row["input"] for row in rows], dtype=object)
    # None (no verdict) becomes NaN, which counts as missing.
    values = np.array([[row.get(m) for m in METRICS] for row in rows], np.float64).reshape(-1, len(METRICS))
    seen = np.array([bool(row.get("seen")) for row in rows], bool)
    parts = {task: tasks == task for task in dict.fromkeys(tasks)}
    leaked = [task for task, mine in parts.items() if (mine & seen).any() and (mine & ~seen).any()]
    parts |= {f"{task} (unseen)": parts[task] & ~seen for task in leaked}
    parts[OVERALL] = np.ones(len(rows), bool)
    table = {}
    for task, chosen in parts.items():
        found = bootstrap_means(values[chosen], clusters=prompts[chosen], n_boot=n_boot, seed=seed)
        table[task] = {metric: e for metric, e in zip(METRICS, found, strict=True) if e["n"]}
    return table


def format_table(summary: Summary, metrics: Sequence[str] = SHOWN) -> str:
    """The summary as plain text: a block a metric, a line a task, a column a model, last the change.

    The change is between the first and the last model; `*` marks intervals that do not overlap. Where a line
    stands for too few prompts there is none, and a warning stands last.
    """
    models = list(summary)
    tasks = list(dict.fromkeys(task for model in models for task in summary[model]))
    tasks.sort(key=lambda task: task == OVERALL)
    width = max(len(task) for task in [*tasks, "task"])
    lines = []
    for metric in metrics:
        columns = "".join(f"  {model:>24}" for model in models)
        lines.append(f"{metric}\n{'task':<{width}}{columns}" + ("    change" if len(models) > 1 else ""))
        for task in tasks:
            found = [summary[model].get(task, {}).get(metric) for model in models]
            cells = "".join(f"  {cell(e):>24}" for e in found)
            lines.append(f"{task:<{width}}{cells}{_change(found[0], found[-1]) if len(models) > 1 else ''}")
        lines.append("")
    if warning := too_few(summary):
        lines += [warning, ""]
    return "\n".join(lines)


def too_few(summary: Summary) -> str:
    """A line that names the tasks whose intervals rest on fewer than MIN_PROMPTS prompts; "" for none."""
    counts: dict[str, int] = {}
    for by_task in summary.values():
        for task, found in by_task.items():
            seen = max((_clusters(e) for e in found.values()), default=MIN_PROMPTS)
            counts[task] = min(seen, counts.get(task, seen))
    small = [f"{task} ({count})" for task, count in counts.items() if count < MIN_PROMPTS]
    if not small:
        return ""
    return (
        f"Fewer than {MIN_PROMPTS} prompts: {', '.join(small)}. These intervals are too narrow and no change "
        "is marked; evaluate more prompts."
    )


def _clusters(estimate: Estimate) -> int:
    return int(estimate.get("clusters", MIN_PROMPTS))  # a summary of 0.1.0 does not say


def digits(estimate: Estimate) -> int:
    """Decimals to show: three for scores, fewer for large numbers such as token counts."""
    return 3 if abs(estimate["mean"]) < 10 else 1


def separated(a: Estimate, b: Estimate) -> bool:
    """Whether two intervals do not overlap, of prompts enough to say so."""
    if min(_clusters(a), _clusters(b)) < MIN_PROMPTS:
        return False
    return a["hi"] < b["lo"] or b["hi"] < a["lo"]


def cell(e: Estimate | None, sign: str = "") -> str:
    """`mean [lo, hi]` as tables show it, "-" for nothing; sign: `+` where 0 is a point of comparison."""
    if e is None:
        return "-"
    mean, lo, hi = (f"{e[name]:{sign}.{digits(e)}f}" for name in ("mean", "lo", "hi"))
    return f"{mean} [{lo}, {hi}]"


def _change(a: Estimate | None, b: Estimate | None) -> str:
    if a is None or b is None:
        return ""
    return f"{b['mean'] - a['mean']:>+10.{digits(b)}f}{' *' if separated(a, b) else ''}"
