"""A training step of transformers' Qwen2 in eager PyTorch a round; runs in this project's environment.

Separate rows without padding, logits at the completions only, AdamW after clipping.
"""

import numpy as np
import torch
import transformers


def clipped_loss(logp: torch.Tensor, advantage: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The PPO clip of the first update after a rollout, mean over tokens."""
    ratio = torch.exp(logp - logp.detach())
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage).mean()


def load(spec: dict) -> transformers.PreTrainedModel:
    """The weights in the precision and on the device of the spec."""
    dtype = getattr(torch, spec["dtype"])
    return transformers.AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=dtype).to(spec["device"])


def main() -> None:
    from rounds import Rounds, read_spec  # beside this script, as the other peers have it

    spec, rounds = read_spec(), Rounds()
    torch.set_num_threads(spec["threads"])
    model = load(spec).train()
    if spec["remat"]:
        model.gradient_checkpointing_enable()
    tokens = np.load(spec["tokens"])
    prompt, completion = (tokens[name].astype(np.int64) for name in ("prompt", "completion"))
    rows = torch.from_numpy(np.concatenate([prompt, completion], axis=1)).to(spec["device"])
    advantage, new = torch.from_numpy(tokens["advantage"]).to(spec["device"]), completion.shape[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec["lr"], weight_decay=spec["weight_decay"])
    while True:
        rounds.wait()
        logits = model(input_ids=rows, use_cache=False, logits_to_keep=new + 1).logits[:, :-1]
        logp = torch.log_softmax(logits.float(), -1).gather(-1, rows[:, -new:, None])[..., 0]
        loss = clipped_loss(logp, advantage, *spec["clip"]) if spec["policy"] else -logp.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rounds.done(loss=loss.item())


if __name__ == "__main__":
    main()
