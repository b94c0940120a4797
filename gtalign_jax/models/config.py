"""Architecture of a decoder-only transformer, read from and written to a Hugging Face `config.json`.

Covers the dense Qwen2 / Qwen2.5, Qwen3 and Llama 3 families. A field that would change the numbers
and is not understood is refused by name: a silently ignored setting is a wrong model.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from gtalign_jax.errors import INF, MAX_COUNT, UserError, in_range, naming, positive, within
from gtalign_jax.models.rope import RopeConfig

FAMILIES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}

DTYPES = ("float32", "bfloat16", "float16")
REMAT = ("none", "dots", "full")
DECODE_LAYOUTS = ("auto", "rows", "features", "gathered")  # see `models.layouts`
ATTENTION = ("auto", "xla", "chunked", "splash", "cudnn")  # see `models.fused`
_CHOICES = {
    "compute_dtype": DTYPES,
    "param_dtype": DTYPES,
    "remat": REMAT,
    "decode_layout": DECODE_LAYOUTS,
    "attention": ATTENTION,
}

# Fields that are read below, and fields that cannot change a forward pass.
_READ = set(
    """model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers head_dim
    num_attention_heads num_key_value_heads rope_theta rope_scaling rope_parameters rms_norm_eps
    tie_word_embeddings attention_bias mlp_bias hidden_act use_sliding_window sliding_window
    max_window_layers layer_types max_position_embeddings initializer_range""".split()
)
_NEUTRAL = set(
    """_name_or_path attention_dropout bos_token_id eos_token_id pad_token_id dtype torch_dtype use_cache
    transformers_version pretraining_tp chunk_size_feed_forward id2label label2id return_dict
    output_attentions output_hidden_states is_encoder_decoder problem_type""".split()
)
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"),
    *("head_dim", "max_positions"),
)


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """How a model is computed, whatever it is; no part of an HF folder.

    compute_dtype: activations and matmuls; param_dtype: storage, both one of DTYPES. remat: `none`, `dots`
    (keep matmul outputs) or `full` (keep layer inputs). scan_layers: one compiled layer in a scan, or an
    unrolled loop, which is faster on CPU and slower to compile. decode_layout: one of DECODE_LAYOUTS.
    attention: one of ATTENTION.
    """

    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    decode_layout: str = "auto"
    attention: str = "auto"

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes of a model and how it is computed; hashable, so it can be a static argument of `jit`.

    head_dim may differ from hidden_size / num_heads. window and window_layers: attention reaches
    `window` tokens back in the layers marked True (0 and () for full attention everywhere).
    source: the JSON this was read from.
    """

    family: str = "qwen2"
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    rope: RopeConfig = RopeConfig()
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = True
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int = 0
    window_layers: tuple[bool, ...] = ()
    max_positions: int = 32768
    initializer_range: float = 0.02
    runtime: RuntimeConfig = RuntimeConfig()
    source: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r}: must be one of {', '.join(FAMILIES)}")
        within(self, 1, MAX_COUNT, *_SIZES)
        positive(self, "rms_norm_eps")
        in_range(self, window=(0, MAX_COUNT), initializer_range=(0, INF))
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: must be even; positions turn pairs of numbers")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads}: must divide hidden_size={self.hidden_size}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}")


def read_config(folder: str | pathlib.Path, runtime: RuntimeConfig = RuntimeConfig()) -> ModelConfig:
    """The model of an HF folder's `config.json`, to be computed as `runtime` says."""
    path = pathlib.Path(folder) / "config.json"
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; --model must be a Hugging Face model folder") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    return dataclasses.replace(from_hf(fields, str(path)), runtime=runtime)


def from_hf(fields: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """ModelConfig from HF config fields. Raises UserError naming any field it cannot honour."""
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type {family!r} is not supported; use one of {', '.join(FAMILIES)}")
    unknown = sorted(set(fields) - _READ - _NEUTRAL)
    if unknown:
        raise UserError(f"{where}: field {unknown[0]!r} is not understood and may change the numbers")
    if fields.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {fields['hidden_act']!r} is not supported; only silu is")
    heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
    attention_bias = fields.get("attention_bias", False)
    window, window_layers = _sliding_window(fields, layers)
    with naming(f"{where}: "):
        return ModelConfig(
            family=family,
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            intermediate_size=fields["intermediate_size"],
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or (128 if family == "qwen3" else fields["hidden_size"] // heads),
            rope=RopeConfig.from_hf(fields, where),
            rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
            tie_embeddings=fields.get("tie_word_embeddings", False),
            qkv_bias=True if family == "qwen2" else attention_bias,
            output_bias=False if family == "qwen2" else attention_bias,
            mlp_bias=fields.get("mlp_bias", False) if family == "llama" else False,
            qk_norm=family == "qwen3",
            window=window,
            window_layers=window_layers,
            max_positions=fields.get("max_position_embeddings", 32768),
            initializer_range=fields.get("initializer_range", 0.02),
            source=json.dumps(dict(fields)),
        )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` fields: those it was read from, or a fresh set for a model made here."""
    if config.source:
        return json.loads(config.source)
    fields = {
        "architectures": [FAMILIES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "dtype": config.runtime.param_dtype,
        **config.rope.to_hf(),
    }
    if config.family != "qwen2":
        fields["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        fields["mlp_bias"] = config.mlp_bias
    return fields


def _sliding_window(fields: Mapping[str, Any], layers: int) -> tuple[int, tuple[bool, ...]]:
    """(window, which layers use it); older configs give a first layer, newer ones a list of types."""
    window = fields.get("sliding_window") or 0
    if not window or not fields.get("use_sliding_window", False):
        return 0, ()
    types = fields.get("layer_types")
    if types:
        return window, tuple(kind == "sliding_attention" for kind in types)
    first = fields.get("max_window_layers", layers)
    return window, tuple(i >= first for i in range(layers))
