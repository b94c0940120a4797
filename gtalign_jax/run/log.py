"""The metrics of a run: metrics.jsonl always, TensorBoard by default, W&B when configured.

A line of `metrics.jsonl` is `{"phase", "step", "time", <key>: number, ...}`: `step` counts updates from
0 within its phase, `time` is in Unix seconds, and a value that is not finite is null, so that every line
is strict JSON. Keys read `group/name`; `KEYS` lists those that the report and the health checks know.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.files import drafts

KEYS = {
    "loss/sft": "cross-entropy of the cold-start chains, nats per token",
    "sft/perplexity": "of held-out chains, at the end of an epoch of the cold start",
    "sft/format": "share of whole chains that the model writes to their prompts",
    "loss/policy": "policy loss of the update",
    "reward/welfare": "mean welfare W of the batch",
    "reward/user": "mean user reward U",
    "reward/llm": "mean assistant reward L",
    "reward/format": "share of completions with the four blocks in order",
    "reward/answer": "mean answer score",
    "kl/ref": "KL from the policy to the frozen reference, nats per token",
    "fluency/mean": "log-probability of the responses under the reference, nats per token",
    "entropy/mean": "policy entropy, nats per token",
    "length/mean": "completion length, tokens",
    "length/truncated": "share of completions that met the token budget",
    "judge/missing": "share of samples without a verdict",
    "group/zero_variance": "share of prompt groups whose rewards are all equal",
    "grad/norm": "global gradient norm before clipping",
    "update/skipped": "1 when the update was skipped because it was not finite",
    "sampler/gap": "mean difference between the sampler's and the trainer's logprobs, nats",
    "compile/programs": "programs compiled during the step: zero after the first of a phase",
    "tokens_per_s": "tokens trained on, or generated, per second of wall clock",
}


# Where files cannot grow (on a store) they are put whole: this often, and before every checkpoint.
BRING_S = 30.0


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """Where metrics go besides metrics.jsonl.

    tensorboard: write event files under `tensorboard/<phase>`. wandb_project: also log to Weights &
    Biases, when not empty; wandb_mode: `online`, `offline` or `disabled`.
    """

    tensorboard: bool = True
    wandb_project: str = ""
    wandb_mode: str = "online"

    def __post_init__(self) -> None:
        if self.wandb_mode not in ("online", "offline", "disabled"):
            raise ValueError(f"wandb_mode={self.wandb_mode!r}: must be online, offline or disabled")


class RunLog:
    """The metrics of one run, written by one process; a context manager.

    Call `begin` when a phase is about to run steps, then `write` once a step.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        phases: Sequence[str],
        config: MetricsConfig = MetricsConfig(),
        *,
        settings: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """phases: every phase of the run, in order. settings: the run's config, which W&B shows."""
        self._workdir, self._path = workdir, metrics_path(workdir)
        self._phases, self._config, self._clock = tuple(phases), config, clock
        self._grown = drafts.grown(workdir)
        self._brought = clock()
        self._file: TextIO | None = None
        self._recorded: set[tuple[str, int]] = set()
        self._board: Any = None
        self._wandb: Any = None
        if config.wandb_project:
            self._wandb = _open_wandb(workdir, self._grown.folder, config, self._phases, dict(settings or {}))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, phase: str, step: int, *, again: bool = False) -> None:
        """The run goes on at `step` of `phase`; what an earlier attempt recorded from there on is dropped.

        The file then holds what an uninterrupted run would hold here, apart from times. again: the steps are
        only computed again, for a later phase that has checkpoints: all that is on record stays as it is. Do
        not call it for a phase that is already finished: the phases after it would be dropped.
        """
        self._close_files()
        here = (self._order(phase), step)
        lines = jsonl.read(self._path)
        kept = [x for x in lines if again or (self._order(x["phase"]), x["step"]) < here]
        here_path = metrics_path(self._grown.folder)
        jsonl.write(here_path, kept)
        self._bring()
        self._recorded = {(x["phase"], x["step"]) for x in kept}
        self._file = here_path.open("a", encoding="utf-8")
        if self._config.tensorboard and not again:
            for later in self._phases[here[0] + 1 :]:
                drafts.remove(self._workdir / "tensorboard" / later)
            self._board = _open_board(self._grown.folder / "tensorboard" / phase, step)

    def write(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Record one step, once. values: flat key to number (Python, NumPy or fetched device scalars)."""
        if self._file is None:
            raise ValueError(f"begin({phase!r}, {step}) must come before write")
        if (phase, int(step)) in self._recorded:
            return
        values = jsonl.plain(values)
        line = {"phase": phase, "step": int(step), "time": round(self._clock(), 3), **values}
        # Flushed at once: a kill loses nothing that was recorded before it.
        with drafts.naming_faults(self._path):
            print(jsonl.encode(line), file=self._file, flush=True)
        finite = {key: value for key, value in values.items() if value is not None}
        if self._board is not None:
            for key, value in finite.items():
                self._board.add_scalar(key, value, int(step))
        if self._wandb is not None:
            self._wandb.log({f"{phase}/{k}": v for k, v in finite.items()} | {f"{phase}/step": int(step)})
        if self._clock() - self._brought > BRING_S:
            self.flush()

    def flush(self) -> None:
        """What was written is where a run that goes on will find it."""
        if self._board is not None:
            self._board.flush()
        self._bring()

    def close(self) -> None:
        """Flush and close everything."""
        self._close_files()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        self._bring()
        self._grown.close()

    def _bring(self) -> None:
        self._grown.bring()
        self._brought = self._clock()

    def _close_files(self) -> None:
        for sink in (self._file, self._board):
            if sink is not None:
                with drafts.naming_faults(self._path):
                    sink.close()
        self._file = self._board = None

    def _order(self, phase: str) -> int:
        if phase not in self._phases:
            known = ", ".join(self._phases)
            raise UserError(f"{self._path}: phase {phase!r} is not of this run ({known}); name a new workdir")
        return self._phases.index(phase)


class NullLog(RunLog):
    """The log of a process that writes nothing."""

    def __init__(self) -> None:
        pass

    def begin(self, phase: str, step: int, *, again: bool = False) -> None:
        pass

    def write(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def metrics_path(workdir: pathlib.Path) -> pathlib.Path:
    """The metrics file of a run."""
    return workdir / "metrics.jsonl"


def _open_board(folder: pathlib.Path, step: int) -> Any:
    """An event writer whose readers forget events at `step` and later from earlier attempts."""
    import tensorboardX  # imported here: it loads torch where that is installed, which takes seconds

    # The suffix keeps an attempt begun in the same second from writing over the one before it.
    suffix = f".{step}.{uuid.uuid4().hex[:8]}"
    return tensorboardX.SummaryWriter(str(folder), purge_step=step, filename_suffix=suffix)


def _open_wandb(
    workdir: pathlib.Path,
    folder: pathlib.Path,
    config: MetricsConfig,
    phases: Sequence[str],
    settings: dict[str, Any],
) -> Any:
    """A W&B run that a resumed job continues: its id is kept in the workdir, its files grow in `folder`."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"config.metrics.wandb_project={config.wandb_project!r} needs W&B: pip install wandb"
        ) from error
    id_file = workdir / "wandb_id"
    if not id_file.is_file():
        jsonl.write_atomic(id_file, uuid.uuid4().hex[:16])
    run = wandb.init(
        project=config.wandb_project,
        mode=config.wandb_mode,
        id=id_file.read_text(),
        resume="allow",
        dir=str(folder),
        config=settings,
    )
    for phase in phases:
        run.define_metric(f"{phase}/step")
        run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
    return run
