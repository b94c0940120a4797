"""The paper's run from Qwen/Qwen3-8B, for v5e:8x8: mixed, or one task with `:math`."""

from configs import paper


def get_config(task: str = "full"):
    """A mesh of 16 x 4 chips. 32 query and 8 K/V heads allow tensor = 4 or 8."""
    return paper.on_pod("Qwen/Qwen3-8B", task, fsdp=16, tensor=4)
