"""The whole path on the embedded tasks, from nothing, in minutes on two CPU cores.

`quickstart.py:tiny` is the same path in seconds, for tests.
"""

from configs import base
from gtalign_jax.errors import UserError


def get_config(variant: str = ""):
    if variant not in ("", "tiny"):
        raise UserError(f"config variant {variant!r}: use tiny, or leave it out")
    config = base.get_config()
    config.max_new_tokens = 144
    config.buckets.prompt = (64,)
    config.buckets.completion = (144,)
    config.data.train_per_task = 1024
    config.data.test_per_task = 64
    config.model.update(hidden_size=128, intermediate_size=256, num_layers=3, num_heads=4, num_kv_heads=2)
    config.model.initializer_range = 0.08  # about 1 / sqrt(hidden_size): a small model learns faster
    config.start.scan_layers = False
    config.sft.update(steps=960, prompts=16, chains=2, exercises=1.0, choice_weight=5.0)
    config.sft_optimizer.update(name="muon", lr=4e-3, schedule="cosine", final=0.0, warmup=10)
    config.align.update(algorithm="grpo", steps=50, prompts=16, group_size=8)
    # The choice goes on following the matrix: alignment has to write the right matrix, and steering works.
    config.align.untrained_blocks = ("analyze",)
    config.algorithm.kl_coef = 0.3  # and the response goes on doing what was chosen
    config.policy_optimizer.update(lr=3e-4, warmup=3)
    config.steer.step = 0.5  # the teacher writes halves
    config.checkpoint.every = 20
    if variant == "tiny":
        config.buckets.prompt = (96,)
        config.sft_optimizer.update(name="adamw", warmup=1)  # which compiles sooner
        config.data.update(train_per_task=16, test_per_task=2)
        config.model.update(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1)
        config.model.head_dim = 16
        config.sft.update(steps=4, prompts=4, exercises=0.0, choice_weight=1.0)
        config.align.update(steps=4, prompts=2, group_size=8, dump_every=2)
        config.checkpoint.every = 2
        config.steer.tries = 1
    return config
