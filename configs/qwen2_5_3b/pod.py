"""Qwen2.5-3B-Instruct on TPU v5e, 16 chips or 256: what its five runs share."""

from configs import paper


def get_config(task: str):
    """A run of the paper on a mesh of 8 x 2 chips.

    Two K/V heads allow tensor = 2. The mini-batch of 32 prompts leaves few rows for more chips.
    """
    config = paper.on_pod("Qwen/Qwen2.5-3B-Instruct", task, fsdp=8, tensor=2)
    config.align.rollout_prompts = 256 if task == "full" else 64
    config.algorithm.microbatches = 2 if task == "full" else 4
    config.sft.microbatches = 4 if task == "full" else 8
    return config
