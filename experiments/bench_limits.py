"""Work that a model cannot avoid, counted from its shape: the limits the benchmarks print beside a rate.

Counted are matrix products: projections, attention over the visible pairs of positions, and logits of
the completion tokens; of the last layer, a prompt's keys and values and what its last token makes of them. A
backward pass is twice its forward pass. Recomputation is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments import bench_common as common
from experiments.bench_common import Workload


def layer_weights(fields: Mapping[str, Any]) -> int:
    """Weights of one layer's projections (HF config fields)."""
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    head = width // heads
    attention = width * head * (2 * heads + 2 * fields["num_key_value_heads"])
    return attention + 3 * width * fields["intermediate_size"]


def key_weights(fields: Mapping[str, Any]) -> int:
    """Weights of one layer's keys and values."""
    head = fields["hidden_size"] // fields["num_attention_heads"]
    return 2 * fields["hidden_size"] * head * fields["num_key_value_heads"]


def step_flops(fields: Mapping[str, Any], size: Workload, *, shared: bool) -> float:
    """FLOPs of a forward and backward pass over a workload, its prompts computed once or once a row."""
    layers, width = fields["num_hidden_layers"], fields["hidden_size"]
    copies = size.prompts if shared else size.rows
    tokens = copies * size.slots + size.rows * size.new
    pairs = copies * size.slots * (size.slots + 1) / 2
    pairs += size.rows * size.new * (size.slots + (size.new + 1) / 2)
    forward = 2 * layers * layer_weights(fields) * tokens + 4 * layers * width * pairs
    unread = copies * (size.slots - 1)  # states of prompts after the last layer
    forward -= 2 * (layer_weights(fields) - key_weights(fields)) * unread + 2 * width * unread * size.slots
    forward += 2 * fields["vocab_size"] * width * size.rows * size.new
    return 3 * forward


def model_weights(fields: Mapping[str, Any]) -> int:
    """Weights that a decode step multiplies: all layers' and the vocabulary's."""
    return fields["num_hidden_layers"] * layer_weights(fields) + fields["vocab_size"] * fields["hidden_size"]


def reading_seconds(fields: Mapping[str, Any], dtype: str) -> float:
    """Seconds of a decode step that only reads every weight once."""
    return {"float32": 4, "bfloat16": 2}[dtype] * model_weights(fields) / common.machine(dtype)[1]


def decode_seconds(fields: Mapping[str, Any], rows: int, dtype: str) -> float:
    """Seconds of a decode step that only reads every weight once, or only multiplies them: the longer."""
    multiplying = 2 * model_weights(fields) * rows / common.machine(dtype)[0]
    return max(multiplying, reading_seconds(fields, dtype))
