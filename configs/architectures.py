"""Public architectures by name, as `config.model` fields: the numbers of their `config.json`.

Training reads the architecture from `config.start.path`; these numbers let `experiments.plan` work with
no checkpoint at hand. The vocabulary's size stands in `config.start.vocab_size`.
"""

import ml_collections

_QWEN2_5 = dict(family="qwen2", head_dim=128, rms_norm_eps=1e-6, qkv_bias=True, max_positions=32768)
_LLAMA3_SCALING = (
    ("factor", 8.0),
    ("high_freq_factor", 4.0),
    ("low_freq_factor", 1.0),
    ("original_max_position_embeddings", 8192),
)

# hub name → (vocabulary, RoPE theta, RoPE kind, RoPE scaling, other fields)
ARCHITECTURES = {
    "Qwen/Qwen2.5-0.5B-Instruct": (151936, 1e6, "default", (), dict(
        _QWEN2_5 | dict(head_dim=64), hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14,
        num_kv_heads=2, tie_embeddings=True,
    )),
    "Qwen/Qwen2.5-3B-Instruct": (151936, 1e6, "default", (), dict(
        _QWEN2_5, hidden_size=2048, intermediate_size=11008, num_layers=36, num_heads=16, num_kv_heads=2,
        tie_embeddings=True,
    )),
    "Qwen/Qwen2.5-7B-Instruct": (152064, 1e6, "default", (), dict(
        _QWEN2_5, hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4,
        tie_embeddings=False,
    )),
    "Qwen/Qwen2.5-32B-Instruct": (152064, 1e6, "default", (), dict(
        _QWEN2_5, hidden_size=5120, intermediate_size=27648, num_layers=64, num_heads=40, num_kv_heads=8,
        tie_embeddings=False,
    )),
    "Qwen/Qwen3-8B": (151936, 1e6, "default", (), dict(
        family="qwen3", hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32,
        num_kv_heads=8, head_dim=128, rms_norm_eps=1e-6, qkv_bias=False, qk_norm=True,
        tie_embeddings=False, max_positions=40960,
    )),
    "meta-llama/Llama-3.1-8B-Instruct": (128256, 5e5, "llama3", _LLAMA3_SCALING, dict(
        family="llama", hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
        num_kv_heads=8, head_dim=128, rms_norm_eps=1e-5, qkv_bias=False, tie_embeddings=False,
        max_positions=131072,
    )),
}  # fmt: skip


def start_from(config: ml_collections.ConfigDict, name: str) -> None:
    """Start from the hub model `name`, and write its architecture into `config.model`."""
    vocabulary, theta, kind, scaling, fields = ARCHITECTURES[name]
    config.start.path = name
    config.start.vocab_size = vocabulary
    config.model.update(fields)
    config.model.rope.update(theta=theta, kind=kind)
    config.model.rope.scaling = scaling
