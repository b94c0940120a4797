"""The adapters of a run (`models.lora`): made where training starts, saved beside the model."""

import functools
import pathlib

import jax

from gtalign_jax.mesh import processes
from gtalign_jax.mesh.sharding import shard_tree
from gtalign_jax.models import lora, peft_files
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.run.job import Job
from gtalign_jax.run.settings import Settings
from gtalign_jax.types import PyTree


def add_adapters(job: Job, params: PyTree) -> PyTree:
    """The starting parameters with fresh adapters when the config trains those (`config.lora.rank`)."""
    config, key = job.settings.lora, jax.random.key(job.settings.seed + 3)
    if not config.rank:
        return params
    make = functools.partial(lora.init_adapters, model=job.model, config=config)
    shardings = shard_tree(lora.adapter_axes(job.model, config), job.mesh, jax.eval_shape(make, key))
    return lora.join(params, jax.jit(make, out_shardings=shardings)(key))


def save_adapters(
    params: PyTree, settings: Settings, model: ModelConfig, folder: pathlib.Path, start: pathlib.Path
) -> None:
    """A PEFT folder with the adapters alone, for the model in `start`; nothing where there are none."""
    trained, base = lora.split(params)
    if base is None:
        return
    trained = processes.fetch(trained)
    if processes.is_main():
        name = settings.start.path or str(start)
        peft_files.save_adapters(trained, model, settings.lora, folder, base=name)
