"""Adapters as the folder that the PEFT library, vLLM and SGLang read: adapter_config.json + safetensors.

`lora_A.weight` is stored [r, inputs] and `lora_B.weight` [outputs, r], under the projection's own name
behind `base_model.model.`; the library adds lora_alpha / r times B A to the projection.
"""

import json
import pathlib
from typing import Any

import numpy as np

from gtalign_jax.files import drafts
from gtalign_jax.models import stored
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.hf_names import Entry, name_table
from gtalign_jax.models.lora import TRAINED, LoraConfig, Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapters(
    trained: Params, model: ModelConfig, config: LoraConfig, folder: pathlib.Path, *, base: str
) -> None:
    """Write the adapters `trained` (`lora.split`, host arrays) of the model named `base` in float32.

    Each file appears whole, the configuration last.
    """
    tensors = {}
    for entries, leaf in _entries(model, config, trained):
        for layer, entry in enumerate(entries):
            tensors[entry.name] = entry.to_stored(np.asarray(leaf[layer], np.float32))
    shapes = {name: array.shape for name, array in tensors.items()}
    with drafts.file(folder / WEIGHTS, "wb") as file:
        stored.write_tensors(file, shapes, "float32", (tensors[name] for name in sorted(tensors)))
    with drafts.file(folder / CONFIG) as file:
        file.write(json.dumps(adapter_fields(model, config, base), indent=2, sort_keys=True) + "\n")


def adapter_fields(model: ModelConfig, config: LoraConfig, base: str) -> dict[str, Any]:
    """The fields of adapter_config.json."""
    table = name_table(model)["layers"]
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha  # usually read as int
    modules = [table[name]["kernel"][0].name.split(".")[-2] for name in config.targets]
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
    }


def _entries(model: ModelConfig, config: LoraConfig, trained: Params) -> list[tuple[tuple[Entry, ...], Any]]:
    """(an entry per layer, leaf [L, ...]) of every adapter matrix."""
    table, found = name_table(model)["layers"], []
    for name in config.targets:
        kernels = table[name]["kernel"]
        outputs, inputs = (len(axes) for axes in kernels[0].axes)
        layouts = {
            "lora_A": ((inputs,), tuple(range(inputs))),  # held [inputs..., r]
            "lora_B": (tuple(range(1, outputs + 1)), (0,)),  # held [r, outputs...]
        }
        for leaf, (theirs, axes) in zip(TRAINED, layouts.items(), strict=True):
            names = [f"base_model.model.{k.name.removesuffix('.weight')}.{theirs}.weight" for k in kernels]
            found.append((tuple(Entry(n, axes) for n in names), trained["layers"][name][leaf]))
    return found
