"""The paper's run from Qwen/Qwen2.5-32B-Instruct, for v5p:4x4x4: mixed, or one task with `:math`."""

from configs import paper


def get_config(task: str = "full"):
    """A mesh of 16 x 4 chips. 40 query and 8 K/V heads allow tensor = 4 or 8."""
    return paper.on_pod("Qwen/Qwen2.5-32B-Instruct", task, fsdp=16, tensor=4)
