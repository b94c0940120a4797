"""The paper's mixed run on all four tasks: Qwen2.5-3B-Instruct, 2048 prompt and 4096 completion tokens."""

from configs.qwen2_5_3b import pod


def get_config():
    return pod.get_config("full")
