"""The quickstart's code on the published data: long real prompts, rule judges, a small model, few steps.

python -m experiments.train --config=configs/real_small.py --config.data.root=DIR --workdir=runs/real
"""

from configs import base


def get_config():
    config = base.get_config()
    config.data.update(
        source="gtalign", root="../shared/data/gtalign", tasks=("math", "ambig_qa", "wildguard")
    )
    config.data.update(train_per_task=200, test_per_task=8)
    config.max_new_tokens = 192
    config.buckets.prompt = (1024, 1280, 1536)
    config.buckets.completion = (192,)
    config.start.vocab_size = 4096
    config.start.scan_layers = False
    config.model.update(hidden_size=128, intermediate_size=384, num_layers=4, num_heads=4, num_kv_heads=2)
    config.sft.update(steps=6, prompts=8, chains=2)
    config.sft_optimizer.update(lr=3e-3, warmup=2)
    config.align.update(steps=4, prompts=4, group_size=8, dump_every=1)
    config.algorithm.kl_coef = 0.01
    config.policy_optimizer.lr = 1e-4
    config.evaluate.update(samples=1, prompts=8)
    config.checkpoint.every = 4
    config.steer.tries = 1
    return config
