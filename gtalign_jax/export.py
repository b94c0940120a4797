"""From a run's checkpoints to a Hugging Face folder, without its data, judge or engine."""

from __future__ import annotations

import logging
import pathlib

import jax

from gtalign_jax import checkpoint
from gtalign_jax.adapters import save_adapters
from gtalign_jax.align import start_state
from gtalign_jax.data.tokenizer import load_tokenizer
from gtalign_jax.errors import UserError
from gtalign_jax.job import read_config_json, save_model, start_folder
from gtalign_jax.models import hf, lora
from gtalign_jax.models.config import ModelConfig, read_config
from gtalign_jax.settings import Settings, make_settings
from gtalign_jax.train import PHASES, sft_state
from gtalign_jax.types import PyTree, TrainState

log = logging.getLogger(__name__)


def export_checkpoint(checkpoints: pathlib.Path, out: pathlib.Path) -> str:
    """Write the newest policy under `RUN/checkpoints` as the HF folder `out`; returns "phase step n".

    The newest readable checkpoint of the last phase that has one is taken. Where it holds adapters, they are
    merged into the model the run started from, and stand alone in `OUT_adapter`, in PEFT's format. Raises
    UserError when there is no checkpoint, or when the folder is not one of a run.
    """
    workdir = checkpoints.absolute().parent
    settings = make_settings(read_config_json(workdir))
    folder = start_folder(settings, workdir)
    model = read_config(folder, **settings.start.switches)
    for phase in reversed(PHASES):
        if not (checkpoints / phase).is_dir():
            continue
        manager = checkpoint.open_manager(checkpoints / phase, keep=settings.checkpoint.keep)
        found = checkpoint.restore_latest(manager, _like(phase, settings, model))
        manager.close()
        if found is not None:
            step, state = found
            params = _whole(state.policy.params, settings, model, folder)
            save_model(params, model, out, load_tokenizer(folder))
            save_adapters(params, settings, model, out.with_name(f"{out.name}_adapter"), folder)
            return f"{phase} step {step}"
    raise UserError(f"{checkpoints}: holds no checkpoint; name the checkpoints folder of a run")


def _whole(trained: PyTree, settings: Settings, model: ModelConfig, folder: pathlib.Path) -> PyTree:
    """The policy that a checkpoint's parameters are, or are the adapters of."""
    if not settings.lora.rank:
        return trained
    fresh = lora.init_adapters(jax.random.key(0), model, settings.lora)  # for what is not trained of it
    return lora.join(lora.join(hf.load_params(folder, model), fresh), trained)


def _like(phase: str, settings: Settings, model: ModelConfig) -> TrainState:
    """A state of the phase as shapes on the first device; nothing of its size is computed."""

    def make(params: PyTree) -> TrainState:
        return sft_state(settings, params) if phase == "sft" else start_state(settings, model, params)

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    trained, _ = lora.split(lora.abstract_params(model, settings.lora))
    state = jax.eval_shape(make, trained)
    # Only a real key says how its words are to be read.
    return jax.tree.map(place, state.replace(rng=None)).replace(rng=jax.random.key(0))
