"""TRL's GRPOTrainer, one training step a round. Runs in the environment of trl.txt.

The defaults that would slow it down on a small model are off (gradient checkpointing, bf16 on a CPU);
all rows form one batch, so the policy is generated from, scored and updated once a step, in the parts of
the spec.
"""

import os
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import torch
from datasets import Dataset
from rounds import Rounds, read_spec
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def main() -> None:
    spec, rounds = read_spec(), Rounds()
    torch.set_num_threads(spec["threads"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(spec["tokenizer"])
    model = AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=torch.float32)
    for prompt in spec["prompts"]:
        found = len(tokenizer(prompt)["input_ids"])
        if found != spec["slots"]:
            raise RuntimeError(f"a prompt has {found} tokens here, not {spec['slots']}")
    lengths: list[int] = []

    def reward(completions, completion_ids, **_):
        lengths[:] = [len(ids) for ids in completion_ids]
        return [len(text.split()) % 8 / 7 for text in completions]

    class Talk(TrainerCallback):
        def on_step_begin(self, args, state, control, **_) -> None:
            rounds.wait()

        def on_step_end(self, args, state, control, **_) -> None:
            rounds.done(tokens=sum(lengths))

    with tempfile.TemporaryDirectory() as output:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config(spec, output),
            train_dataset=Dataset.from_dict({"prompt": spec["prompts"]}),
            processing_class=tokenizer,
            callbacks=[Talk()],
        )
        trainer.train()


def config(spec: dict, output: str) -> GRPOConfig:
    """The step of the spec; the sampler draws from the whole softmax at temperature 1."""
    rows = spec["group"] * len(spec["prompts"])
    return GRPOConfig(
        output_dir=output,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows // spec["parts"],
        gradient_accumulation_steps=spec["parts"],
        num_generations=spec["group"],
        max_completion_length=spec["new"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=spec["kl_coef"],
        loss_type="grpo",
        learning_rate=spec["lr"],
        weight_decay=0.01,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        max_steps=10**6,
        logging_steps=10**6,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


if __name__ == "__main__":
    main()
