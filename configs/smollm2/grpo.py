"""SmolLM2-135M-Instruct from the model as it is over the cold start to alignment, in one run.

python -m experiments.train --config=configs/smollm2/grpo.py --config.start.path=DIR \
    --config.sft.demonstrations=CHAINS/train.jsonl --workdir=runs/grpo
"""

from configs.smollm2 import sft


def get_config(variant: str = ""):
    config = sft.get_config(variant)
    config.align.update(algorithm="grpo", steps=40, prompts=16, group_size=8)
    # Without it the choice, which no term of the reward asks for, is the first text that brevity takes away.
    config.align.untrained_blocks = ("analyze",)
    config.algorithm.update(kl_coef=0.02, microbatches=8)
    config.policy_optimizer.update(lr=5e-5, warmup=3)
    if variant == sft.MINUTES:
        config.align.update(steps=3, prompts=4, group_size=6, dump_every=1)
        config.algorithm.microbatches = 4
        config.policy_optimizer.warmup = 1
    return config
