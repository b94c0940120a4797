"""The cold start of SmolLM2-135M-Instruct on chains of the published questions, and nothing after it.

python -m experiments.train --config=configs/smollm2/sft.py --config.start.path=DIR \
    --config.sft.demonstrations=CHAINS/train.jsonl --workdir=runs/sft
"""

from configs import base
from gtalign_jax.errors import UserError

MINUTES = "minutes"


def get_config(variant: str = ""):
    if variant not in ("", MINUTES):
        raise UserError(f"config variant {variant!r}: use {MINUTES}, or leave it out")
    config = base.get_config()
    # Medium's training rows were not published, and a model of this size writes no articles.
    config.data.update(
        source="gtalign", root="../shared/data/gtalign", tasks=("ambig_qa", "wildguard", "math")
    )
    # The published instruction is 1 000 tokens long; conversations under our short one are a tenth of that.
    config.data.update(history="turns", too_long="cut", decontaminate=True)
    config.data.update(train_per_task=0, test_per_task=64)
    config.max_new_tokens = 384
    config.buckets.prompt = (384,)
    config.buckets.completion = (384,)
    config.start.path = "runs/smollm2/model"
    config.start.scan_layers = True  # thirty layers compile for minutes unrolled
    config.sft.update(
        demonstrations="runs/smollm2/chains/train.jsonl", epochs=1, prompts=8, pack=1024, held_out=32
    )
    config.sft_optimizer.update(lr=2e-4, schedule="cosine", warmup=10)
    config.evaluate.update(samples=2, prompts=64)
    config.checkpoint.every = 50
    # Of the second judge, as many answers to a question as an evaluation has.
    config.judge.update(answers=2, question_slots=(448, 640, 1024, 2048), answer_slots=(96, 256, 512))
    config.steer.tries = 2
    if variant == MINUTES:
        config.data.update(train_per_task=48, test_per_task=8)
        config.buckets.prompt = (256,)
        config.sft.update(prompts=2, held_out=0)
        config.sft_optimizer.warmup = 3
        config.evaluate.update(samples=1, prompts=24)
        config.judge.update(answers=1, questions=4)
        config.steer.tries = 0
    return config
