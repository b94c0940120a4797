"""The models that the paper's tables compare: which are still to be trained, how long that takes, and what
they answer."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import pathlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from experiments.from_one_start import align_from, changed, is_trained, train_start
from gtalign_jax import jsonl
from gtalign_jax.config import parse_command, writable_directory
from gtalign_jax.evaluation.paper.entries import ALIGNED, BASE, PRICES, SFT, Entry, Fields, Method
from gtalign_jax.mesh import processes
from gtalign_jax.run.auto import with_values
from gtalign_jax.run.progress import format_seconds

COUNTED = {SFT: "cold starts", ALIGNED: "alignments"}
_UNSEEN: Fields = (("data.tasks", ("minerva_math", "ambig_coqa", "advbench")),)


@dataclasses.dataclass(frozen=True)
class Scale:
    """A config and what the tables change of it.

    unseen: fields that make an evaluation ask tasks which nothing is trained on; () where there are none.
    plain: fields that methods without the chain take too.
    seconds: of a model of each stage with its evaluation, on two CPU cores, where that was measured. games:
    updates and seeds of self-play.
    """

    module: str
    variant: str = ""
    change: Fields = ()
    unseen: Fields = ()
    plain: Fields = ()
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    games: tuple[int, int] = (800, 20)

    def config(self, fields: Sequence[str] = ()) -> ml_collections.ConfigDict:
        """The config, with fields as a command line has them (`--config.a.b=v`) in place of the scale's own.

        UserError, in one line, on an unknown flag or field.
        """
        found = importlib.util.find_spec(self.module)
        assert found is not None and found.origin is not None  # a module of this project
        file = f"--config={':'.join(filter(None, [found.origin, self.variant]))}"
        config, _ = parse_command([sys.argv[0], file, *fields], {})
        given = {field.lstrip("-").removeprefix("config.").partition("=")[0] for field in fields}
        return with_values(config, {field: value for field, value in self.change if field not in given})

    def lacks(self, entry: Entry, config: ml_collections.ConfigDict) -> str:
        """Why there is no such table of a config of this scale, or ""."""
        if entry.unseen and not self.unseen:
            able = ", ".join(name for name, scale in SCALES.items() if scale.unseen)
            return f"This scale has no tasks that nothing is trained on; these have: {able}."
        fields = {field for method in entry.methods for field, _ in (*method.asked, *method.cold)}
        if config.start.path and any(field.startswith("model.") for field in fields):
            return "This scale starts from a model of its own size: compare the tables of several scales."
        if config.sft.demonstrations and "features.chain" in fields:
            return "The demonstrations of this scale are chains: experiments.real trains without them."
        return ""


SCALES = {
    "smoke": Scale("configs.quickstart", "tiny", games=(20, 2)),  # to see that all of it runs
    "tiny": Scale(
        "configs.quickstart",
        # The quickstart's keeps responses to what was chosen; tables compare rewards.
        change=(("align.steps", 40), ("algorithm.kl_coef", 0.05)),
        # A tokenizer that is made of responses alone cuts the same prompts into more tokens.
        plain=(("buckets.prompt", (96,)),),
        seconds={SFT: 300.0, ALIGNED: 120.0},
    ),
    "smollm2": Scale("configs.smollm2.grpo", unseen=_UNSEEN),
    "0.5b": Scale("configs.qwen2_5_0_5b", unseen=_UNSEEN),
    "3b": Scale("configs.qwen2_5_3b.full", unseen=_UNSEEN),
    "7b": Scale("configs.qwen2_5_7b", unseen=_UNSEEN),
}


class Countdown:
    """Says on stderr which model of how many is trained, and how long the rest takes: by the mean of those of
    its stage before it, or else by what the scale says."""

    def __init__(
        self,
        left: Mapping[str, int],
        guesses: Mapping[str, float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """left: of each stage, how many models are to be trained."""
        self._left, self._total = Counter(left), sum(left.values())
        self._guesses, self._clock = guesses, clock
        self._took: dict[str, list[float]] = {}
        counts = ", ".join(f"{COUNTED[stage]} {count}" for stage, count in left.items() if count)
        if counts:
            self._say(f"to train: {counts}{self._told()}")

    def seconds_left(self) -> float:
        """NaN where nothing is known of a stage yet."""
        each = {stage: float(np.mean(took)) for stage, took in self._took.items()}
        return sum(n * each.get(s, self._guesses.get(s, np.nan)) for s, n in self._left.items() if n)

    @contextlib.contextmanager
    def model(self, stage: str, name: str) -> Iterator[None]:
        """Around the training of one."""
        number = self._total - sum(self._left.values()) + 1
        self._say(f"model {number} of {self._total}: {name}{self._told()}")
        began = self._clock()
        yield
        self._took.setdefault(stage, []).append(self._clock() - began)
        self._left[stage] -= 1

    def _told(self) -> str:
        seconds = self.seconds_left()
        return "" if np.isnan(seconds) else f"; {format_seconds(seconds)} left"

    def _say(self, text: str) -> None:
        if processes.is_main():
            print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Lab:
    """Where the models of a scale are trained and asked, and how many are to come."""

    scale: Scale
    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    countdown: Countdown


def open_lab(
    scale: Scale,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    entries: Iterable[Entry],
    seeds: Sequence[int],
) -> Lab:
    """The lab of a scale and its config, which says what the entries still need."""
    left = missing([entry for entry in entries if not scale.lacks(entry, config)], seeds, workdir)
    return Lab(scale, config, workdir, Countdown(left, scale.seconds))


def seeds_of(entry: Entry, seeds: Sequence[int]) -> Sequence[int]:
    """The seeds of those asked for that an entry takes."""
    return seeds[: entry.seeds or None]


def missing(entries: Iterable[Entry], seeds: Sequence[int], workdir: pathlib.Path) -> dict[str, int]:
    """Of each stage, how many models the entries need that are not there."""
    stages: dict[str, str] = {}
    for entry in entries:
        for method in entry.methods:
            stages[method.start] = SFT
            if method.stage == ALIGNED:
                stages |= {method.folder(seed): ALIGNED for seed in seeds_of(entry, seeds)}
    left = Counter(stage for folder, stage in stages.items() if not is_trained(workdir / "runs" / folder))
    return {stage: left[stage] for stage in COUNTED}


def asked_as(lab: Lab, method: Method) -> ml_collections.ConfigDict:
    """The scale's config with what a method changes of the questions."""
    plain = lab.scale.plain if ("features.chain", "plain") in method.asked else ()
    return with_values(lab.config, dict((*method.asked, *plain)))


def trained(lab: Lab, method: Method, seed: int) -> pathlib.Path:
    """The HF folder of a method's model, made, gone on with, or there already."""
    cold = with_values(asked_as(lab, method), dict(method.cold))
    start = lab.workdir / "runs" / method.start
    if not is_trained(start):
        with lab.countdown.model(SFT, method.start):
            train_start(cold, start)
    if method.stage == BASE:
        # What the cold start began with: a model that is made anew needs the tokenizer of its text.
        from gtalign_jax.run.job import start_folder
        from gtalign_jax.run.settings import make_settings

        return start_folder(make_settings(cold), start)
    run = lab.workdir / "runs" / method.folder(seed)
    if not is_trained(run):
        with lab.countdown.model(ALIGNED, f"{method.name}, seed {seed}"):
            align_from(with_values(changed(cold, seed=seed), dict(method.change)), start, run)
    return run / "hf"


def answers(lab: Lab, entry: Entry, method: Method, seeds: Sequence[int]) -> list[list[dict[str, Any]]]:
    """The held-out rollout lines of a method's models, one a seed; of one that is not aligned there is one.

    All are evaluated as the scale's config says: with its reward, whatever they were trained on. Of several
    processes all take part, and process 0 alone has the lines.
    """
    asked = with_values(asked_as(lab, method), dict(lab.scale.unseen if entry.unseen else ()))
    found = []
    for seed in seeds if method.stage == ALIGNED else seeds[:1]:
        folder = lab.workdir / ("unseen" if entry.unseen else "evaluations") / method.folder(seed)
        if not is_trained(folder):
            evaluate(asked, trained(lab, method, seed), folder)
        found.append(_read_by_main(folder / "rollouts" / "model_0.jsonl"))
    return found


def _read_by_main(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a file, on process 0, which wrote it."""
    return jsonl.read(path) if processes.is_main() else []


def evaluate(config: ml_collections.ConfigDict, model: pathlib.Path, folder: pathlib.Path) -> None:
    """Evaluate an export on the held-out prompts of the scale's config."""
    from gtalign_jax.train import evaluate_model

    with contextlib.redirect_stdout(sys.stderr):
        evaluate_model(config, str(model), writable_directory(str(folder), "workdir"), "model")


def steered(lab: Lab, method: Method, seed: int) -> list[dict[str, Any]]:
    """The lines of a method's model at each of PRICES, on the held-out prompts (`serving.sweep`); of several
    processes as `answers`."""
    lines = lab.workdir / "steering" / method.folder(seed) / "sweep.jsonl"
    if not processes.from_main(lines.is_file):
        from gtalign_jax.serving.sweep import Pricing, named_policy
        from gtalign_jax.train import steer_model

        config = asked_as(lab, method)
        policy = config.steer.policy
        pricing = Pricing(policy, named_policy(policy, "config.steer.policy"), step=config.steer.step)
        model = trained(lab, method, seed)
        folder = writable_directory(str(lines.parent), "workdir")
        with contextlib.redirect_stdout(sys.stderr):
            steer_model(config, str(model), folder, pricing, PRICES)
    return _read_by_main(lines)
