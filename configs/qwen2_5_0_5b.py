"""The paper's run from Qwen/Qwen2.5-0.5B-Instruct, for v5e:2x4: mixed, or one task with `:math`."""

from configs import paper


def get_config(task: str = "full"):
    """A mesh of 4 x 2 chips: 14 query and 2 K/V heads allow tensor = 2."""
    return paper.on_pod("Qwen/Qwen2.5-0.5B-Instruct", task, fsdp=4, tensor=2)
