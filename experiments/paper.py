"""The paper's tables and what became of its claims:

    python -m experiments.paper --scale=tiny --table=reward_ablation --workdir=runs/paper
    python -m experiments.paper --scale=tiny --all --workdir=runs/paper

Trains the models that a table compares, evaluates each on the same held-out prompts with the same reward, and
writes tables/NAME.{md,json,svg} and claims.md into the work directory. Models that several tables need are
trained once, from one cold start; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from experiments.compare_algorithms import read_seeds
from experiments.from_one_start import align_from, changed, train_start
from gtalign_jax import jsonl
from gtalign_jax.config import to_json, writable_directory
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.evaluation.paper import figures, games, tables
from gtalign_jax.evaluation.paper.entries import ALIGNED, BASE, ENTRIES, Entry, Method
from gtalign_jax.run.auto import with_values

SCALES = {
    "smoke": ("configs.quickstart", "tiny"),  # to see that all of it runs
    "tiny": ("configs.quickstart", ""),
    "3b": ("configs.qwen2_5_3b.full", ""),
    "7b": ("configs.qwen2_5_7b", ""),
}
GAME_UPDATES, GAME_SEEDS = {"smoke": 20}, {"smoke": 2}  # else:
MANY_UPDATES, MANY_SEEDS = 800, 20


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--scale", default="tiny", choices=tuple(SCALES), help="whose config is trained")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--table", help=f"names after commas: {', '.join(ENTRIES)}")
    which.add_argument("--all", action="store_true", help="every table")
    parser.add_argument("--workdir", required=True, help="folder of all runs and tables")
    parser.add_argument("--seeds", default="0,1,2", help="of the alignments, after commas")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    names = list(ENTRIES) if flags.all else flags.table.split(",")
    for name in names:
        if name not in ENTRIES:
            raise UserError(f"--table={name}: no such table; use {', '.join(ENTRIES)}")
    seeds = read_seeds(flags.seeds)
    config = scale_config(flags.scale)
    workdir = writable_directory(flags.workdir, "workdir")
    check_scale(config, workdir / "scale.json")
    for name in names:
        entry = ENTRIES[name]
        table = make(entry, config, workdir, seeds, flags.scale)
        text = tables.format_table(entry, table)
        jsonl.write_atomic(workdir / "tables" / f"{name}.md", text)
        found = {"claim": entry.claim, "seeds": seeds, **dataclasses.asdict(table)}
        found["differences"] = {name: d._asdict() for name, d in table.differences.items()}
        jsonl.write_atomic(
            workdir / "tables" / f"{name}.json", json.dumps(jsonl.plain(found), indent=1) + "\n"
        )
        print(f"## {name}\n\n{text}")
    jsonl.write_atomic(workdir / "claims.md", claims(workdir))


def scale_config(scale: str) -> ml_collections.ConfigDict:
    """The config of a scale, as its file makes it."""
    module, variant = SCALES[scale]
    return importlib.import_module(module).get_config(*([variant] if variant else []))


def check_scale(config: ml_collections.ConfigDict, path: pathlib.Path) -> None:
    """One work directory holds the tables of one config: another's models are not mixed with them."""
    text = to_json(config)
    if not path.is_file():
        jsonl.write_atomic(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path}: holds the models of another scale or config; name a new --workdir")


def make(
    entry: Entry, config: ml_collections.ConfigDict, workdir: pathlib.Path, seeds: Sequence[int], scale: str
) -> tables.Table:
    """The table of an entry, and its figure."""
    figure = workdir / "tables" / f"{entry.name}.svg"
    if entry.kind == "games":
        updates, count = GAME_UPDATES.get(scale, MANY_UPDATES), GAME_SEEDS.get(scale, MANY_SEEDS)
        curves = games.learning_curves(updates, count)
        figures.save_curves(curves, figure)
        return games.games_table(curves)
    runs = {method.name: answers(method, config, workdir, seeds) for method in entry.methods}
    table = tables.make_table(entry, runs)
    if table.rows:
        figures.save_table(entry, table, figure)
    return table


def answers(
    method: Method, config: ml_collections.ConfigDict, workdir: pathlib.Path, seeds: Sequence[int]
) -> list[list[dict[str, Any]]]:
    """The held-out rollout lines of a method's models, one a seed; of one that is not aligned there is one.

    All are evaluated as the scale's config says: with its reward, whatever they were trained on.
    """
    asked = with_values(config, dict(method.asked))
    cold = with_values(asked, dict(method.cold))
    marks = (f"{field}={value}" for field, value in (*method.asked, *method.cold))
    start = workdir / "runs" / slug("start", *marks)
    if method.stage == BASE:
        start = workdir / "runs" / "base"
        cold.sft.steps = cold.sft.epochs = 0
    found = []
    for seed in seeds if method.stage == ALIGNED else seeds[:1]:
        name = slug(method.name, *([str(seed)] if method.stage == ALIGNED else []))
        lines = workdir / "evaluations" / name / "rollouts" / "model_0.jsonl"
        summary = workdir / "evaluations" / name / "summary.json"
        if not summary.is_file():  # written last
            train_start(cold, start)
            folder = start
            if method.stage == ALIGNED:
                folder = workdir / "runs" / name
                align_from(with_values(changed(cold, seed=seed), dict(method.change)), start, folder)
            evaluate(asked, folder / "hf", workdir / "evaluations" / name)
        found.append(jsonl.read(lines))
    return found


def evaluate(config: ml_collections.ConfigDict, model: pathlib.Path, folder: pathlib.Path) -> None:
    """Evaluate an export on the held-out prompts of the scale's config."""
    from gtalign_jax.train import evaluate_model

    with contextlib.redirect_stdout(sys.stderr):
        evaluate_model(config, str(model), writable_directory(str(folder), "workdir"), "model")


def slug(*parts: str) -> str:
    """A name for a folder."""
    return re.sub(r"[^\w.+=-]+", "_", "_".join(parts))


def claims(workdir: pathlib.Path) -> str:
    """What became of the claims of all tables that are there, as Markdown."""
    lines = ["| table | the paper's claim | here |", "|---|---|---|"]
    for name, entry in ENTRIES.items():
        path = workdir / "tables" / f"{name}.json"
        if path.is_file():
            found: Mapping[str, Any] = jsonl.read_object(path)
            lines.append(f"| {name} | {entry.claim} | {found['verdict'] or 'numbers alone'} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
