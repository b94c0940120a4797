"""Tunix's sampler, one batch of completions a round. Runs in the environment of tunix.txt."""

import jax
from rounds import Rounds, read_spec
from tunix.generate.sampler import CacheConfig, Sampler
from tunix_model import load, load_tokenizer


def main() -> None:
    spec, rounds = read_spec(), Rounds()
    model = load(spec)
    sizes = (model.config.num_layers, model.config.num_kv_heads, model.config.head_dim)
    cache = CacheConfig(spec["slots"] + spec["new"], *sizes)
    sampler = Sampler(model, load_tokenizer(spec), cache)
    prompts = [prompt for prompt in spec["prompts"] for _ in range(spec["group"])]
    seed = 0
    while True:
        rounds.wait()
        seed += 1
        out = sampler(
            prompts,
            max_generation_steps=spec["new"],
            max_prompt_length=spec["slots"],
            eos_tokens=[-1],
            temperature=1.0,
            top_p=1.0,
            seed=jax.random.key(seed),
        )
        rounds.done(tokens=sum(len(row) for row in out.tokens))


if __name__ == "__main__":
    main()
