"""Runs that share a cold start: it is trained once, and every alignment goes on from its export."""

from __future__ import annotations

import contextlib
import copy
import pathlib
import sys

import ml_collections

from gtalign_jax.config import writable_directory
from gtalign_jax.files import drafts
from gtalign_jax.mesh import processes
from gtalign_jax.run.rollouts import list_rollouts, newest


def changed(config: ml_collections.ConfigDict, **fields: object) -> ml_collections.ConfigDict:
    """An unlocked copy with some fields of the top level changed."""
    copied = copy.deepcopy(config)  # ConfigDict(config) would share its sections
    copied.unlock()
    copied.update(fields)
    return copied


def is_trained(run: pathlib.Path) -> bool:
    """Whether a run came to its end, as process 0 finds: the summary is written after the model."""
    return processes.from_main((run / "summary.json").is_file)


def train_start(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Train and evaluate the cold start of a config in `folder`."""
    config = changed(config)
    config.align.steps = 0
    train_quietly(config, folder)


def align_from(config: ml_collections.ConfigDict, start: pathlib.Path, folder: pathlib.Path) -> None:
    """One alignment run of a config from the model that `train_start` left in `start`."""
    config = changed(config)
    config.start.path = str(start / "hf")
    config.sft.steps = config.sft.epochs = 0
    processes.from_main(lambda: copy_evaluation(start, folder))
    train_quietly(config, folder)


def copy_evaluation(start: pathlib.Path, folder: pathlib.Path) -> None:
    """Every run starts from the same model: its evaluation is that of the shared run, made once."""
    baseline = folder / "rollouts" / "sft_0.jsonl"
    if not baseline.is_file():
        made = newest(list_rollouts(start), "sft")
        assert made is not None  # its run is at its end
        with drafts.file(baseline, "wb") as sink:
            sink.write(made.read_bytes())


def train_quietly(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """One run of the training job; its own table goes to stderr, standard output is for the comparison."""
    from gtalign_jax.train import train  # JAX starts only when the command line is right

    folder = writable_directory(str(folder), "workdir")
    with contextlib.redirect_stdout(sys.stderr):
        train(config, folder)
