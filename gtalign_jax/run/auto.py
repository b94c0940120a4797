"""Fields of a config that may say `auto`: what fits the memory is chosen as a run starts, and it keeps that.

The config that comes from a user holds the word; `Settings` never do. `planning.choose` chooses.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

AUTO = "auto"
# Field → what stands for it while nothing is chosen: what costs least to compute.
COUNTS = {"sft.microbatches": 1, "algorithm.microbatches": 1, "align.rollout_prompts": 0}
FIELDS: Mapping[str, Any] = {"start.remat": "none", **COUNTS}
# Says `auto` of itself too, by the length of the rows; with one of the others it is chosen as well.
ATTENTION = "start.attention"


def asked(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The fields that are to be chosen."""
    found = tuple(field for field in FIELDS if value_of(config, field) == AUTO)
    return (*found, ATTENTION) if found and value_of(config, ATTENTION) == AUTO else found


def with_values(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A copy of the config with these values in place of what its fields say."""
    copy = config.copy_and_resolve_references()
    for field, value in values.items():
        section, _, name = field.partition(".")
        with copy.unlocked(), copy.ignore_type():
            copy[section][name] = value
    return copy


def until_chosen(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config with the cheapest values for what is to be chosen; itself where nothing is."""
    fields = [field for field in asked(config) if field != ATTENTION]
    return with_values(config, {field: FIELDS[field] for field in fields}) if fields else config


def value_of(config: Mapping[str, Any], field: str) -> Any:
    """What a config says of a field; None where it does not have it."""
    section, _, name = field.partition(".")
    return config.get(section, {}).get(name)
