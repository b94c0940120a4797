"""The paper's run (arXiv 2510.08872, section 5 and its launch scripts): PPO with a critic on welfare.

512 prompts a step, one completion each, 16 mini-batches of 32; actor 1e-6, critic 2e-6; about 150 steps
from a cold start of 6 epochs over 9 000 demonstrations, 64 a step.
"""

import ml_collections

from configs import architectures, base
from gtalign_jax.errors import UserError

DEMONSTRATIONS, EPOCHS = 9000, 6
TASKS = ("math", "medium", "ambig_qa", "wildguard")


def get_config(model: str, task: str = "full") -> ml_collections.ConfigDict:
    """The run that starts from a hub model, on one task or, mixed, on all four (`full`).

    Budgets of prompt and completion: 8192 and 8192 tokens for one task, 2048 and 4096 mixed.
    """
    if task not in (*TASKS, "full"):
        raise UserError(f"config variant {task!r}: use full or one of {', '.join(TASKS)}")
    tasks = TASKS if task == "full" else (task,)
    prompt, completion = (2048, 4096) if task == "full" else (8192, 8192)
    config = base.get_config()
    architectures.start_from(config, model)
    config.start.update(compute_dtype="bfloat16", remat="full")
    config.data.update(source="gtalign", root="data/gtalign", tasks=tasks, train_per_task=0, test_per_task=0)
    config.max_new_tokens = completion
    config.buckets.prompt = tuple(s for s in (512, 1024, 2048, 4096, 8192) if s <= prompt)
    config.buckets.completion = (completion,)
    config.sft.update(steps=-(-DEMONSTRATIONS * EPOCHS // 64), prompts=64, chains=1)
    config.sft_optimizer.lr = 1e-6
    config.align.update(algorithm="ppo_paper", steps=150, prompts=512, group_size=1)
    config.align.normalize = "zscore" if len(tasks) > 1 else "none"
    config.policy_optimizer.lr = 1e-6
    config.critic_optimizer.lr = 2e-6
    config.evaluate.prompts = 256
    config.checkpoint.every = 10
    return config


def on_pod(model: str, task: str, fsdp: int, tensor: int) -> ml_collections.ConfigDict:
    """That run on a mesh of fsdp x tensor chips; a larger slice splits the sequence over the rest."""
    config = get_config(model, task)
    config.mesh.update(fsdp=fsdp, tensor=tensor, context=-1)
    config.start.decode_layout = "gathered"
    config.algorithm.microbatches = 1
    config.sft.microbatches = 4
    return config
