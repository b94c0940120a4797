"""SmolLM2-135M-Instruct on the published questions: a real model, cold start and alignment.

`experiments.real` runs all of it; docs/results/smollm2 holds what came of it. `sft` is the cold start, `grpo`
goes on from it with alignment, and `:minutes` of either is the size that two CPU cores do in minutes.
"""
