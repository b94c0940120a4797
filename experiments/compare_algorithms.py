"""Compare algorithms on the embedded tasks: presets x seeds from one shared SFT model, with intervals.

    python -m experiments.compare_algorithms --config=configs/quickstart.py --workdir=runs/compare \
        --config.critic_optimizer.lr=1e-3 [--presets=grpo,ppo] [--seeds=0,1,2]

The SFT model is trained once in WORKDIR/sft; every other run starts from it, in WORKDIR/PRESET_SEED, with
the preset as it is (fields of config.algorithm are not applied). Each run resumes like any other, so the
same command finishes a comparison that was stopped. Writes comparison.json and comparison.md.
"""

from __future__ import annotations

import json
import logging
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from experiments.fields import explain
from experiments.from_one_start import align_from, changed, train_start
from gtalign_jax import jsonl
from gtalign_jax.config import parse_command, writable_directory
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.learning.algorithm import PRESETS, resolve_algorithm

COLUMNS = {"utility": "welfare", "answer_reward": "answer", "format_reward": "format", "n_tokens": "tokens"}
EXPLAINED = "explained variance"
LAST_STEPS = 10  # the critic is judged by its mean over the last steps of a run

Interval = dict[str, float]


@exit_on_user_error
def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    optional = {"presets": "names, or module:function, after commas", "seeds": "numbers after commas"}
    config, flags = parse_command(argv, {"workdir": "folder of all runs"}, optional, explain)
    presets = flags["presets"].split(",") if flags["presets"] else list(PRESETS)
    _refuse_twice(presets, "presets")
    for name in presets:
        resolve_algorithm(name)  # a misspelt one is refused before hours of work
    seeds = read_seeds(flags["seeds"] or "0,1,2")
    workdir = writable_directory(flags["workdir"], "workdir")
    sft = shared_start(config, workdir / "sft")
    runs: dict[str, list[dict[str, float]]] = {}
    for name in presets:
        for seed in seeds:
            run = workdir / f"{name.replace(':', '.')}_{seed}"
            align_from(with_preset(config, name, seed), workdir / "sft", run)
            runs.setdefault(name, []).append(run_numbers(run))
    table = compare(sft, runs)
    jsonl.write_atomic(workdir / "comparison.json", json.dumps(jsonl.plain(table), indent=1) + "\n")
    text = format_markdown(table, len(seeds))
    jsonl.write_atomic(workdir / "comparison.md", text)
    print(text)


def shared_start(config: ml_collections.ConfigDict, folder: pathlib.Path) -> dict[str, Interval]:
    """Train the SFT model once; its overall metrics, with intervals over prompts."""
    train_start(config, folder)
    return jsonl.read_object(folder / "summary.json")["sft"]["overall"]


def with_preset(config: ml_collections.ConfigDict, preset: str, seed: int) -> ml_collections.ConfigDict:
    """The config of one alignment run."""
    config = changed(config, seed=seed)
    config.align.algorithm = preset
    for field in config.algorithm:
        config.algorithm[field] = None
    return config


def run_numbers(folder: pathlib.Path) -> dict[str, float]:
    """The aligned model's overall means, and the critic's explained variance where there is one."""
    summary = jsonl.read_object(folder / "summary.json")["aligned"]["overall"]
    numbers = {metric: summary[metric]["mean"] for metric in COLUMNS if metric in summary}
    lines = [line for line in jsonl.read(folder / "metrics.jsonl") if line["phase"] == "align"]
    recorded = (line.get("value/explained_variance") for line in lines[-LAST_STEPS:])
    explained = [x for x in recorded if x is not None]
    return numbers | ({EXPLAINED: float(np.mean(explained))} if explained else {})


def compare(
    sft: Mapping[str, Interval], runs: Mapping[str, Sequence[Mapping[str, float]]]
) -> dict[str, dict[str, Any]]:
    """{model: {metric: {mean, lo, hi, n}}}; the presets' also hold `gain`, welfare over the SFT model's."""
    table = {"sft": {metric: sft[metric] for metric in COLUMNS if metric in sft}}
    for name, numbers in runs.items():
        table[name] = {
            metric: over_seeds([run[metric] for run in numbers])
            for metric in (*COLUMNS, EXPLAINED)
            if all(metric in run for run in numbers)
        }
        table[name]["gain"] = over_seeds([run["utility"] - sft["utility"]["mean"] for run in numbers])
    return table


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean and 95 % Student interval over independent runs; lo and hi are NaN for a single one."""
    from scipy import stats

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return {"mean": mean, "lo": math.nan, "hi": math.nan, "n": n}
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return {"mean": mean, "lo": mean - half, "hi": mean + half, "n": n}


def format_markdown(table: Mapping[str, Mapping[str, Interval]], seeds: int) -> str:
    """The comparison as a Markdown table, the best welfare first."""
    metrics = ("utility", "gain", "answer_reward", "format_reward", "n_tokens", EXPLAINED)
    heads = [COLUMNS.get(metric, metric) for metric in metrics]
    lines = [f"| algorithm | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in sorted(table, key=lambda name: -table[name]["utility"]["mean"]):
        cells = [_cell(table[name].get(metric)) for metric in metrics]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = f"Means over {seeds} seeds with 95 % Student intervals; `sft` is one model, its intervals are"
    return "\n".join([*lines, "", f"{note} bootstrapped over prompts.", ""])


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    digits = 3 if abs(interval["mean"]) < 10 else 1
    mean, lo, hi = (f"{interval[k]:.{digits}f}" for k in ("mean", "lo", "hi"))
    return mean if math.isnan(interval["lo"]) else f"{mean} [{lo}, {hi}]"


def read_seeds(text: str) -> list[int]:
    """Seeds after commas; UserError for what is none, or one that stands there twice."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds={text}: give whole numbers after commas, such as 0,1,2") from error
    if not all(0 <= seed < 2**63 for seed in seeds):
        raise UserError(f"--seeds={text}: seeds are whole numbers from 0 to 2**63 - 1")
    _refuse_twice(seeds, "seeds")
    return seeds


def _refuse_twice(names: Sequence[str | int], flag: str) -> None:
    """A run that is counted twice would narrow its interval."""
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--{flag}: {name} stands there twice; name each once")


if __name__ == "__main__":
    main(sys.argv)
