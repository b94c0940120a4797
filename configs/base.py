"""Every default, once: each section is a frozen dataclass of the room that uses it."""

import dataclasses

import ml_collections
from ml_collections import config_dict

from gtalign_jax.config import section
from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.rewards.mutual_welfare import RewardConfig
from gtalign_jax.rollout.grammar import BlockLimits
from gtalign_jax.run import auto, settings


def get_config() -> ml_collections.ConfigDict:
    """The config all others change."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    # Completion slots N of training and evaluation, in tokens.
    config.max_new_tokens = 512
    for name, cls in settings.SECTIONS.items():
        config[name] = section(cls)
    # Tokens that a block may take under the grammar; None for no limit of its own.
    names = [field.name for field in dataclasses.fields(BlockLimits)]
    config.engine.limits = ml_collections.ConfigDict({name: config_dict.placeholder(int) for name in names})
    # The architecture made when config.start.path is empty.
    config.model = section(ModelConfig)
    for name in ("source", "vocab_size", "runtime"):
        del config.model[name]  # fixed by the tokenizer, or said by config.start
    config.reward = section(RewardConfig)
    config.reward.fn = "cobb_douglas"
    # Fields of the algorithm's preset to change; None keeps the preset's value.
    config.algorithm = ml_collections.ConfigDict(
        {
            field.name: config_dict.placeholder(type(getattr(AlgorithmConfig(), field.name)))
            for field in dataclasses.fields(AlgorithmConfig)
        }
    )
    # Numbers in whose place the word `auto` may stand.
    for path in auto.COUNTS:
        name, _, field = path.partition(".")
        value = config[name][field]
        del config[name][field]
        config[name][field] = config_dict.FieldReference(value, field_type=object)
    return config
