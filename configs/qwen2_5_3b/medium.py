"""The paper's single-task run on medium: Qwen2.5-3B-Instruct, 8192 prompt and 8192 completion tokens."""

from configs.qwen2_5_3b import pod


def get_config():
    return pod.get_config("medium")
