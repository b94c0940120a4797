"""The paper's run from Qwen/Qwen2.5-7B-Instruct, for v5e:8x8: mixed, or one task with `:math`."""

from configs import paper


def get_config(task: str = "full"):
    """A mesh of 16 x 4 chips. 28 query and 4 K/V heads allow tensor = 4."""
    return paper.on_pod("Qwen/Qwen2.5-7B-Instruct", task, fsdp=16, tensor=4)
