"""A resumable phase of training: steps 0..n-1, checkpoints between them, metrics read one step late.

Data order and random keys are functions of the step, so a phase that was killed goes on from its newest
checkpoint and ends with the bytes of one that was not.
"""

import collections
import contextlib
import dataclasses
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from gtalign_jax.data.order import Feed
from gtalign_jax.errors import MAX_COUNT, UserError, in_range
from gtalign_jax.mesh import processes
from gtalign_jax.mesh.memory import UPDATE, Purpose, told
from gtalign_jax.mesh.sharding import spread
from gtalign_jax.run import checkpoint, health
from gtalign_jax.run.compiles import CompileCount, counting_compiles
from gtalign_jax.run.layout import restored, stored
from gtalign_jax.run.log import KEYS, RunLog
from gtalign_jax.run.progress import Progress, stage
from gtalign_jax.run.signals import stop_requests
from gtalign_jax.types import Ratio, TrainState

log = logging.getLogger(__name__)
Metrics = Mapping[str, Any]
Step = Callable[[TrainState, int], tuple[TrainState, Metrics]]
WarmUp = Callable[[TrainState, int], None]


# What the keys of metrics begin with.
_GROUPS = {key.partition("/")[0] for key in KEYS} | {"action", "ratio", "value"}


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every `every` steps and at the end of a phase; the newest `keep` stay.

    keep_best: so many more stay, those with the highest metric `best`.
    """

    every: int = 50
    keep: int = 2
    keep_best: int = 0
    best: str = "reward/welfare"

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.keep_best < 0:
            raise ValueError(f"keep_best={self.keep_best}: must be 0 or more")
        if self.keep_best and self.best.partition("/")[0] not in _GROUPS:
            raise ValueError(f"best={self.best!r}: must be a key of metrics.jsonl, such as reward/welfare")
        in_range(self, every=(1, MAX_COUNT), keep=(1, MAX_COUNT), keep_best=(0, MAX_COUNT))


@dataclasses.dataclass(frozen=True)
class Phase:
    """steps 0..n-1 of one kind of training.

    step: (state, k) → (state, metrics). warm_up: called before the first of these steps with the state and
    its number, to compile what they all will run; counted as that step's. following: the phases after it;
    once one of them has checkpoints, lost steps of this one are computed again, and recorded where they are
    not. feed: what the steps train on; a checkpoint says how far it was read. takes: what most of its memory
    is for.
    """

    name: str
    steps: int
    step: Step
    warm_up: WarmUp | None = None
    following: tuple[str, ...] = ()
    takes: Purpose = UPDATE
    feed: Feed[Any] | None = None


@dataclasses.dataclass(frozen=True)
class Session:
    """What all phases of a run share: where it writes, its mesh and its log."""

    workdir: pathlib.Path
    mesh: Mesh
    checkpoint: CheckpointConfig
    health: health.HealthConfig
    log: RunLog
    compiles: CompileCount


@contextlib.contextmanager
def open_session(
    workdir: pathlib.Path,
    mesh: Mesh,
    log: RunLog,
    checkpoints: CheckpointConfig,
    health_config: health.HealthConfig,
) -> Iterator[Session]:
    """A session with the mesh made current and the log open."""
    with jax.set_mesh(mesh), log, counting_compiles() as compiles:
        yield Session(workdir, mesh, checkpoints, health_config, log, compiles)


def open_manager(
    folder: pathlib.Path, config: CheckpointConfig, *, read_only: bool = False
) -> ocp.CheckpointManager:
    """The manager of a phase's checkpoints, which keeps those that the config says."""
    return checkpoint.open_manager(
        folder, keep=config.keep, keep_best=config.keep_best, best=config.best, read_only=read_only
    )


def run_phase(session: Session, phase: Phase, state: TrainState) -> TrainState:
    """The state after all steps of a phase, from its newest checkpoint on.

    A stop that was asked for by a signal saves the state and ends the process with status 128 + its number.
    """
    state = spread(state, session.mesh)
    folder = session.workdir / "checkpoints" / phase.name
    with (
        checkpoint.naming_lost_saves(folder, stored(state)),
        contextlib.closing(open_manager(folder, session.checkpoint)) as manager,
    ):
        later = [session.workdir / "checkpoints" / name for name in phase.following]
        again = processes.from_main(lambda: any(map(checkpoint.has_steps, later)))
        found = checkpoint.restore_latest(manager, stored(state), needed=not again)
        first, tree = found or (0, stored(state))
        state = restored(tree)
        if again and first < phase.steps:
            log.warning("%s: steps %d to %d are computed again", phase.name, first, phase.steps - 1)
        if first < phase.steps:
            checkpoint.drop_after(manager, first)
            with stop_requests() as stop, told(phase.takes):
                state = _steps(session, phase, state, _Start(first, manager, stop, again))
            with stage(f"save the end of {phase.name}"):
                manager.wait_until_finished()
    return state


@contextlib.contextmanager
def _fed(phase: Phase, manager: ocp.CheckpointManager, first: int) -> Iterator[None]:
    """The feed of a phase stands at its first step, and is closed in the end."""
    if phase.feed is None:
        yield
        return
    with contextlib.closing(phase.feed):
        if first:
            phase.feed.go_on(first, checkpoint.read_meta(manager, first).get("data", {}))
        yield


@dataclasses.dataclass(frozen=True)
class _Start:
    """Where a phase goes on, where it saves, the signal that asked it to stop (0: none), and whether a later
    phase has checkpoints, so that its steps are only computed again."""

    step: int
    manager: ocp.CheckpointManager
    stop: Callable[[], int]
    again: bool


def _steps(session: Session, phase: Phase, state: TrainState, start: _Start) -> TrainState:
    """The state after the steps of a phase that are left."""
    config, steps, manager = session.checkpoint, phase.steps, start.manager
    session.log.begin(phase.name, start.step, again=start.again)
    session.compiles.take()
    if phase.warm_up is not None:
        phase.warm_up(state, start.step)
    with Progress(phase.name, steps, start.step) as progress:
        recorder = _Recorder(session, phase.name, progress)
        for k in range(start.step, steps):
            state, metrics = phase.step(state, k)
            recorder.add(k, metrics)
            done, stop = k + 1, max(processes.all_gather(start.stop()))
            if done % config.every == 0 or done == steps or stop:
                # On record before it is saved: the run that goes on from there does not make it again.
                recorder.flush()
                session.log.flush()
                numbers = to_numbers(metrics) if config.keep_best else None
                checkpoint.save(manager, done, stored(state), _meta(phase, done), numbers)
            if stop and done < steps:
                manager.wait_until_finished()
                progress.say(
                    f"stopped on request after step {k} of {phase.name}; run the same command to go on"
                )
                sys.exit(128 + stop)
    return state


def _meta(phase: Phase, done: int) -> dict[str, Any]:
    """What stands beside the state of a phase after `done` steps."""
    read = dict(phase.feed.state(done)) if phase.feed is not None else {}
    return {"phase": phase.name, "step": done} | ({"data": read} if read else {})


class _Recorder:
    """Fetches the metrics of a step while the next one runs, logs and checks them."""

    def __init__(self, session: Session, phase: str, progress: Progress) -> None:
        self._session, self._phase, self._progress = session, phase, progress
        self._late: tuple[int, Metrics] | None = None
        self._arrived = time.monotonic()
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=20)
        self._history: list[dict[str, Any]] = []

    def add(self, k: int, metrics: Metrics) -> None:
        """Step k has been started; its metrics are fetched at the next call."""
        compiled = self._session.compiles.take()
        self.flush()
        self._late = k, {**metrics, "compile/programs": compiled}

    def flush(self) -> None:
        """Log what is still to be logged; a health rule may end the run with a UserError."""
        if self._late is None:
            return
        (k, metrics), self._late = self._late, None
        with stage(f"{self._phase} step {k}: update", after=10.0):
            values = to_numbers(metrics)
        values, running = self._rated(values)
        self._session.log.write(self._phase, k, values)
        self._progress.update(k + 1, values | running)
        self._history.append({"phase": self._phase, "step": k, **values})
        for finding in health.check(self._history, self._session.health):
            self._progress.say(str(finding))
            if finding.stop:
                raise UserError(f"{finding}; metrics are in {self._session.workdir / 'metrics.jsonl'}")

    def _rated(self, values: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
        """(values of a step that have just arrived, with its tokens per second; those of the last steps).

        From one arrival to the next, because a step is only dispatched when it returns.
        """
        now = time.monotonic()
        seconds, self._arrived = max(now - self._arrived, 1e-9), now
        tokens = values.pop("tokens", None)
        if tokens is None:
            return values, {}
        self._recent.append((tokens, seconds))
        running = sum(n for n, _ in self._recent) / sum(s for _, s in self._recent)
        return values | {"tokens_per_s": tokens / seconds}, {"tokens_per_s": running}


def to_numbers(metrics: Metrics) -> dict[str, float]:
    """Device metrics as plain numbers, with those that follow from several of them."""
    values = {key: _number(value) for key, value in jax.device_get(dict(metrics)).items()}
    if "value/return_square" in values:
        spread_of_returns = values.pop("value/return_square") - values["value/return"] ** 2
        values["value/explained_variance"] = 1.0 - values["value/error"] / max(spread_of_returns, 1e-8)
    return values


def _number(value: Any) -> float:
    """A fetched metric; divided here and not by `Ratio.value`, which would compile a division of its own."""
    if not isinstance(value, Ratio):
        return float(np.asarray(value))
    return float(value.total) / max(float(value.count), 1e-30) if value.count > 0 else 0.0
