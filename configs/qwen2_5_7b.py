"""The paper's run from Qwen/Qwen2.5-7B-Instruct, for v5e:8x8: mixed, or one task with `:math`."""

from configs import paper


def get_config(task: str = "full"):
    """A mesh of 16 x 4 chips. 28 query and 4 K/V heads allow tensor = 4."""
    config = paper.get_config("Qwen/Qwen2.5-7B-Instruct", task)
    config.mesh.update(fsdp=16, tensor=4, context=-1)
    config.start.decode_layout = "gathered"
    config.algorithm.microbatches = 1
    config.sft.microbatches = 4
    return config
