"""The paper's tables and what became of its claims:

    python -m experiments.paper --scale=tiny --table=reward_ablation --workdir=runs/paper
    python -m experiments.paper --scale=tiny --all --workdir=runs/paper

Trains the models that a table compares, evaluates each on the same held-out prompts with the same reward, and
writes tables/NAME.{md,json,svg}, all on one page tables/index.md, and claims.md into the work directory.
Models that several tables need are trained once, from one cold start; the same command goes on where it
stopped, and says how many are to come. Fields of the scale's config may be given as to `experiments.train`:

    python -m experiments.paper --scale=3b --all --workdir=gs://bucket/paper --config.data.root=gs://bucket/data

`--table=user_study` writes a sheet of answers, and with `--ratings=FILE.csv`, filled in, makes the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Sequence

import ml_collections

from experiments.compare_algorithms import read_seeds
from experiments.paper_models import SCALES, Lab, answers, open_lab, seeds_of, steered
from gtalign_jax import jsonl
from gtalign_jax.config import to_json, writable_directory
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.evaluation.paper import figures, games, pages, tables, user_study
from gtalign_jax.evaluation.paper.entries import ENTRIES, PRICES, Entry
from gtalign_jax.evaluation.steering import save_curve, steering_curve
from gtalign_jax.files import paths
from gtalign_jax.mesh import cluster, processes


def parse_flags(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """(the flags, what else was given: fields of the config)."""
    usage = "%(prog)s --workdir=DIR (--table=NAMES | --all) [flags] [--config.SECTION.FIELD=VALUE ...]"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=usage, allow_abbrev=False)
    parser.add_argument("--scale", default="tiny", choices=tuple(SCALES), help="whose config is trained")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--table", help=f"names after commas: {', '.join(ENTRIES)}")
    which.add_argument("--all", action="store_true", help="every table")
    parser.add_argument("--workdir", required=True, help="folder of all runs and tables")
    parser.add_argument("--seeds", default="0,1,2", help="of the alignments, after commas")
    parser.add_argument("--ratings", help="of user_study, CSV: item, method, rating")
    for name, words in cluster.FLAGS.items():
        parser.add_argument(f"--{name}", default="", help=words)
    return parser.parse_known_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    flags, fields = parse_flags(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    names = list(ENTRIES) if flags.all else flags.table.split(",")
    for name in names:
        if name not in ENTRIES:
            raise UserError(f"--table={name}: no such table; use {', '.join(ENTRIES)}")
    if flags.ratings and "user_study" not in names:
        raise UserError("--ratings: is of the table user_study; name it in --table, or say --all")
    seeds, scale = read_seeds(flags.seeds), SCALES[flags.scale]
    config = scale.config(fields)
    workdir = writable_directory(flags.workdir, "workdir")
    cluster.initialize_from({name: getattr(flags, name) for name in cluster.FLAGS})
    processes.from_main(lambda: check_scale(config, workdir / "scale.json"))
    lab = open_lab(scale, config, workdir, [ENTRIES[name] for name in names], seeds)
    for name in names:
        entry, used = ENTRIES[name], seeds_of(ENTRIES[name], seeds)
        runs = {} if scale.lacks(entry, lab.config) else asked(entry, lab, used)
        processes.from_main(functools.partial(write, entry, runs, lab, used, flags))


def asked(entry: Entry, lab: Lab, seeds: Sequence[int]) -> tables.Runs:
    """What an entry's models answer, trained where they are not there; {} where it has none."""
    if entry.kind != "steering":
        return {method.name: answers(lab, entry, method, seeds) for method in entry.methods}
    lines = steered(lab, entry.methods[0], seeds[0])
    return {f"price {price:g}": [[line for line in lines if line["at"] == price]] for price in PRICES}


def write(entry: Entry, runs: tables.Runs, lab: Lab, seeds: Sequence[int], flags: argparse.Namespace) -> None:
    """Write an entry's table and figure, the claims and the page; print the table."""
    folder = lab.workdir / "tables"
    table = make(entry, runs, lab, flags.ratings)
    text = tables.format_table(entry, table)
    if table.rows and entry.methods:
        text += f"\nSeeds of the alignments: {', '.join(map(str, seeds))}.\n"
        if entry.kind != "steering" and (fewer := tables.unasked(runs)):
            text += f"\n{fewer}\n"
    jsonl.write_atomic(folder / f"{entry.name}.md", text)
    found = {"claim": entry.claim, "seeds": seeds, **dataclasses.asdict(table)}
    found["differences"] = {name: d._asdict() for name, d in table.differences.items()}
    jsonl.write_atomic(folder / f"{entry.name}.json", json.dumps(jsonl.plain(found), indent=1) + "\n")
    print(f"## {entry.name}\n\n{text}", flush=True)
    jsonl.write_atomic(lab.workdir / "claims.md", pages.claims(folder))
    jsonl.write_atomic(folder / "index.md", pages.page(folder, flags.scale))


def check_scale(config: ml_collections.ConfigDict, path: pathlib.Path) -> None:
    """One work directory holds the tables of one config: another's models are not mixed with them."""
    text = to_json(config)
    if not path.is_file():
        jsonl.write_atomic(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path}: holds the models of another scale or config; name a new --workdir")


def make(entry: Entry, runs: tables.Runs, lab: Lab, ratings: str | None) -> tables.Table:
    """The table of an entry, and its figure."""
    figure = lab.workdir / "tables" / f"{entry.name}.svg"
    if why := lab.scale.lacks(entry, lab.config):
        return tables.Table({}, note=why)
    if entry.kind == "games":
        curves = games.learning_curves(*lab.scale.games)
        figures.save_curves(curves, figure)
        return games.games_table(curves)
    if entry.kind == "user_study":
        table = make_study(entry, runs, lab.workdir, ratings)
    else:
        table = tables.make_table(entry, runs)
    if entry.kind == "steering":
        save_curve(steering_curve([line for (lines,) in runs.values() for line in lines]), figure)
    elif table.rows:
        figures.save_table(entry, table, figure)
    return table


def make_study(entry: Entry, runs: tables.Runs, workdir: pathlib.Path, ratings: str | None) -> tables.Table:
    """The table of the ratings; without them, the sheet that people fill in."""
    if ratings is None:
        sheet = workdir / "tables" / "user_study_sheet.csv"
        user_study.write_sheet(runs, sheet)
        return tables.Table({}, note=f"Nobody was asked yet: fill in {sheet.name} and name it by --ratings.")
    known = user_study.first_answers(runs)
    return user_study.study_table(entry, runs, user_study.read_ratings(paths.path(ratings), known))


if __name__ == "__main__":
    main()
