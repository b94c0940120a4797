"""The weights of an HF folder as Tunix's Qwen2. Runs in the environment of tunix.txt."""

import json
import os
import pathlib

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", JAX_PLATFORMS="cpu")

import jax.numpy as jnp
from transformers import PreTrainedTokenizerFast
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as qwen2_params


def load(spec: dict, mesh=None) -> qwen2.Qwen2:
    """float32, plain attention, no rematerialisation: what is fastest on a CPU."""
    fields = json.loads((pathlib.Path(spec["folder"]) / "config.json").read_text())
    rope = fields.get("rope_parameters") or fields
    config = qwen2.ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        head_dim=fields["hidden_size"] // fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        rope_theta=rope["rope_theta"],
        norm_eps=fields["rms_norm_eps"],
        use_tied_embedding=fields["tie_word_embeddings"],
    )
    return qwen2_params.create_model_from_safe_tensors(spec["folder"], config, mesh, dtype=jnp.float32)


def load_tokenizer(spec: dict):
    """The tokenizer of the spec. RuntimeError when a prompt has not the length it was made with."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(spec["tokenizer"])
    for prompt in spec["prompts"]:
        found = len(tokenizer.encode(prompt))
        if found != spec["slots"]:
            raise RuntimeError(f"a prompt has {found} tokens here, not {spec['slots']}")
    return tokenizer
