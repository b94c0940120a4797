"""The small model that tests of generation and serving run: enough heads to share keys, and nothing more."""

from typing import Any

from gtalign_jax.models.config import ModelConfig


def small_model(vocab_size: int, **changes: Any) -> ModelConfig:
    """A Qwen2 of two layers, with these fields changed; its large weights make some tokens likely."""
    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
    }
    return ModelConfig(vocab_size=vocab_size, **(fields | changes))
