"""What is allowed and rarely meant, and what is left out of a run: said once, before its first step."""

import logging
import pathlib

import jax
from jax.sharding import Mesh

from gtalign_jax.chain.prompt import INSTRUCTION, PLAIN_INSTRUCTION, SHORT_INSTRUCTION
from gtalign_jax.data.config import DataConfig
from gtalign_jax.data.loader import PromptSet, mend_of_length, named
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.template import peculiarities
from gtalign_jax.run.settings import Settings

log = logging.getLogger(__name__)
MANY = 12  # layers; an update of 30 layers of SmolLM2, one by one, compiled for 13 minutes on two CPU cores


def of_settings(settings: Settings) -> None:
    """Fields that are rarely meant together."""
    if settings.align.untrained_blocks and not settings.algorithm.kl_coef:
        log.warning("config.align.untrained_blocks: no kl_coef holds their tokens in place; they may drift")
    trains_all = (settings.sft.trains or settings.align.steps) and not settings.lora.rank
    if settings.start.param_dtype == "bfloat16" and trains_all:
        log.warning("config.start.param_dtype: small updates are lost in bfloat16; set config.lora.rank")
    of_instruction(settings.data, settings.features.plain)


def of_mesh(mesh: Mesh) -> None:
    """Accelerators that the mesh leaves idle; a CPU's devices are made up."""
    devices = jax.devices()
    if mesh.size < len(devices) and devices[0].platform != "cpu":
        log.warning(
            "config.mesh takes %d of %d devices; set an axis to -1, such as config.mesh.fsdp=-1, to use all",
            *(mesh.size, len(devices)),
        )


def of_instruction(data: DataConfig, plain: bool) -> None:
    """An instruction that no prompt has, or that asks for what the reward does not read.

    plain: it reads answers without a chain.
    """
    if data.source == "gtalign" and data.history == "given":
        if plain or data.instruction != DataConfig.instruction:
            log.warning(
                "config.data.history=given: the published prompts keep their own instruction, which asks for "
                "a chain; set it to turns"
            )
    elif plain and data.system in (SHORT_INSTRUCTION, INSTRUCTION):
        log.warning(
            "config.data.instruction=%s: asks for a chain, and config.features.chain=plain reads none; "
            "set it to plain",
            data.instruction,
        )
    elif not plain and data.system == PLAIN_INSTRUCTION:
        log.warning("config.data.instruction=plain: asks for no chain; set config.features.chain=plain too")


def of_start(folder: pathlib.Path, engine: Engine) -> None:
    """What the chat template of the starting model does to messages, and layers that take long to compile."""
    for sentence in peculiarities(engine.template):
        log.warning("%s: the chat template %s", folder, sentence)
    layers = engine.model_config.num_layers
    if layers > MANY and not engine.model_config.runtime.scan_layers:
        log.warning(
            "config.start.scan_layers=False: %d layers compiled one by one take minutes a program; set it to "
            "True",
            layers,
        )


def of_prompts(split: str, found: PromptSet, settings: Settings) -> None:
    """What is left out of the prompts of a split: of how many, of which, and what else could be done."""
    longest, dropped = settings.buckets.prompt[-1], [item.where for item in found.dropped]
    if found.cut:
        log.warning(
            "%d %s prompts were over %d tokens and lost their oldest turns", found.cut, split, longest
        )
    if dropped:
        log.warning(
            "%d %s prompts have over %d tokens and are dropped (%s); %s",
            *(len(dropped), split, longest, named(dropped, len(dropped)), mend_of_length(settings.data)),
        )
