"""From a run's checkpoints to a Hugging Face folder, without its data, judge or engine."""

import contextlib
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.files import paths
from gtalign_jax.models import folders, hf, lora
from gtalign_jax.models.config import ModelConfig, read_config
from gtalign_jax.rollout.folder import load_tokenizer
from gtalign_jax.run import checkpoint, checksums
from gtalign_jax.run.adapters import save_adapters
from gtalign_jax.run.card import write_card
from gtalign_jax.run.job import save_model, start_folder
from gtalign_jax.run.layout import restored, stored
from gtalign_jax.run.log import metrics_path
from gtalign_jax.run.phase import CheckpointConfig, open_manager
from gtalign_jax.run.record import read_config_json
from gtalign_jax.run.settings import Settings, make_settings
from gtalign_jax.run.states import PHASES, align_state, make_learner, sft_setup, sft_state
from gtalign_jax.types import PyTree, TrainState


def export_checkpoint(
    checkpoints: pathlib.Path,
    out: pathlib.Path,
    best: bool = False,
    step: int | None = None,
    overwrite: bool = False,
) -> str:
    """Write a policy under `RUN/checkpoints` as the HF folder `out`; returns "phase step n" from its meta.

    The newest readable checkpoint of the last phase that has one is taken, or, with `best`, the one with the
    highest `config.checkpoint.best`, or, with `step`, just that one. Where it holds adapters, they are
    merged into the model the run started from, and stand alone in `OUT_adapter`, in PEFT's format. Raises
    UserError when there is no checkpoint (naming those there are), when the folder is not one of a run,
    when the run compared none, or when `out` holds something; with `overwrite`, something that is no export.
    """
    workdir = paths.absolute(checkpoints).parent
    settings = make_settings(read_config_json(workdir))
    adapter = out.with_name(f"{out.name}_adapter")
    folders.check_free(out, overwrite)
    if settings.lora.rank:
        folders.check_free(adapter, overwrite, folders.ADAPTER)
    folder = start_folder(settings, workdir)
    model = read_config(folder, settings.start.runtime)
    for phase in reversed(PHASES):
        checkpoint.check_folder(checkpoints / phase)
        if not checkpoint.has_steps(checkpoints / phase):
            continue
        found = _read(checkpoints / phase, settings.checkpoint, _like(phase, settings, model), best, step)
        if found is not None:
            meta, state = found
            params = _whole(state.policy.params, settings, model, folder)
            save_model(params, model, out, load_tokenizer(folder, chat=True), folder)
            save_adapters(params, settings, model, adapter, folder)
            write_card(out, read_config_json(workdir), _evaluated(workdir, settings, meta))
            return f"{meta['phase']} step {meta['step']}"
    there = ", ".join(f"{phase} {k}" for phase in PHASES for k in checkpoint.steps_in(checkpoints / phase))
    if there:
        raise UserError(f"--step={step}: {checkpoints} holds no such checkpoint, but {there}")
    raise UserError(f"{checkpoints}: holds no checkpoint; name the checkpoints folder of a run")


def _evaluated(workdir: pathlib.Path, settings: Settings, meta: Mapping[str, Any]) -> Any:
    """The run's summary where it is of this checkpoint: the last of alignment, or of a run without one."""
    counted = settings.sft.steps or max(checkpoint.steps_in(workdir / "checkpoints" / "sft"), default=0)
    last = ("align", settings.align.steps) if settings.align.steps else ("sft", counted)
    path = workdir / "summary.json"
    return jsonl.read_object(path) if path.is_file() and (meta["phase"], meta["step"]) == last else None


def list_checkpoints(checkpoints: pathlib.Path) -> list[str]:
    """A line for each checkpoint of a run: phase, step, when its last step was recorded, W of that step,
    and what is damaged. UserError when there is none."""
    recorded = jsonl.read(metrics_path(paths.absolute(checkpoints).parent))
    last = {(line["phase"], line["step"] + 1): line for line in recorded}
    lines = []
    for phase in PHASES:
        checkpoint.check_folder(checkpoints / phase)
        for step in checkpoint.steps_in(checkpoints / phase):
            line = last.get((phase, step), {})
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line["time"])) if "time" in line else ""
            w, damage = line.get("reward/welfare"), checksums.damage(checkpoints / phase / str(step))
            text = f"{phase:5} {step:6}  {when:19}  {'' if w is None else f'W {w:.3f}':7}"
            lines.append(f"{text}  damaged: {damage}" if damage else text.rstrip())
    if not lines:
        raise UserError(f"{checkpoints}: holds no checkpoint; name the checkpoints folder of a run")
    return lines


def _read(
    folder: pathlib.Path, config: CheckpointConfig, like: TrainState, best: bool, step: int | None
) -> tuple[dict[str, Any], TrainState] | None:
    """(meta, state) of a phase's newest readable checkpoint, or of the chosen one; None when it has none."""
    if best and not config.keep_best:
        raise UserError("--best: config.checkpoint.keep_best=0, so the run compared nothing; leave it out")
    with contextlib.closing(open_manager(folder, config, read_only=True)) as manager:
        if step is not None and step not in checkpoint.steps_in(folder):
            return None
        chosen = checkpoint.best_step(manager) if best else step
        found = checkpoint.restore_latest(manager, stored(like), None if chosen is None else [chosen])
        return None if found is None else (checkpoint.read_meta(manager, found[0]), restored(found[1]))


def _whole(trained: PyTree, settings: Settings, model: ModelConfig, folder: pathlib.Path) -> PyTree:
    """The policy that a checkpoint's parameters are, or are the adapters of."""
    if not settings.lora.rank:
        return trained
    fresh = lora.init_adapters(jax.random.key(0), model, settings.lora)  # for what is not trained of it
    return lora.join(lora.join(hf.load_params(folder, model), fresh), trained)


def _like(phase: str, settings: Settings, model: ModelConfig) -> TrainState:
    """A state of the phase as shapes on the first device; nothing of its size is computed."""

    def make(params: PyTree) -> TrainState:
        if phase == "sft":
            return sft_state(settings, sft_setup(settings, model), params)
        return align_state(settings, make_learner(settings, model, None), params)

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    trained, _ = lora.split(lora.abstract_params(model, settings.lora))
    state = jax.eval_shape(make, trained)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state.replace(rng=None)
    )
    # Only a real key says how its words are to be read.
    return shapes.replace(rng=jax.random.key(0))
