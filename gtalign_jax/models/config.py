"""Architecture of a decoder-only transformer, read from and written to a Hugging Face `config.json`.

Covers the dense Qwen2 / Qwen2.5, Qwen3, Llama 3 and Mistral families. A field that would change the numbers
and is not understood is refused by name: a silently ignored setting is a wrong model.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from gtalign_jax import jsonl
from gtalign_jax.errors import INF, MAX_COUNT, UserError, in_range, naming, positive, within
from gtalign_jax.files import paths
from gtalign_jax.models.fields import choice, number, size, token_ids, truth, warn_of_metadata
from gtalign_jax.models.rope import RopeConfig

FAMILIES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}

DTYPES = ("float32", "bfloat16", "float16")
STORED = (*DTYPES, "float64")  # types of tensors in a folder
_LAYERS = ("full_attention", "sliding_attention")
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

# Fields that are read below, by all families or by one.
_READ = set(
    """model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers head_dim
    num_attention_heads num_key_value_heads rope_theta rope_scaling rope_parameters partial_rotary_factor
    rms_norm_eps tie_word_embeddings hidden_act max_position_embeddings initializer_range dtype
    torch_dtype""".split()
)
_WINDOW = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
_READ_BY = {
    "qwen2": _WINDOW,
    "qwen3": {"attention_bias", *_WINDOW},
    "llama": {"attention_bias", "mlp_bias"},
    "mistral": {"sliding_window"},
}
# Fields of transformers that change no forward pass.
_NEUTRAL = set(
    """_name_or_path name_or_path attention_dropout bos_token_id eos_token_id pad_token_id use_cache
    transformers_version pretraining_tp chunk_size_feed_forward id2label label2id num_labels return_dict
    output_attentions output_hidden_states problem_type _attn_implementation attn_implementation""".split()
)
# Fields that make another model of any family, unless they have this value.
_REFUSED = {
    **dict.fromkeys(
        """quantization_config per_layer_config logit_softcap attn_logit_softcapping final_logit_softcapping
        logit_scale logits_scaling embedding_multiplier residual_multiplier attention_multiplier
        query_pre_attn_scalar clip_qkv num_experts num_local_experts""".split()
    ),
    "partial_rotary_factor": 1.0,
    "is_causal": True,
    "is_encoder_decoder": False,
}
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"),
    *("head_dim", "max_positions"),
)


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """How a model is computed, whatever it is; no part of an HF folder.

    compute_dtype: activations and matmuls; param_dtype: storage, both one of DTYPES. remat: `none`, `dots`
    (keep layer inputs and the products named in `stack.KEPT`) or `full` (keep layer inputs). scan_layers:
    one compiled layer in a scan, or an unrolled loop, which is faster on CPU and slower to compile.
    decode_layout: one of DECODE_LAYOUTS. attention: one of ATTENTION.
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
        if self.window and self.family == "llama":
            raise ValueError(f"window={self.window}: a llama model has none; use family=mistral")
        if self.family == "mistral" and (self.qkv_bias or self.output_bias or self.mlp_bias):
            raise ValueError("qkv_bias, output_bias, mlp_bias: a mistral model has none; set them False")


def read_config(folder: str | pathlib.Path, runtime: RuntimeConfig = RuntimeConfig()) -> ModelConfig:
    """The model of an HF folder's `config.json`, to be computed as `runtime` says."""
    path = paths.path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{path}: not found; --model must be a Hugging Face model folder")
    return dataclasses.replace(from_hf(jsonl.read_object(path), str(path)), runtime=runtime)


def from_hf(fields: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """ModelConfig from HF config fields, with the defaults of transformers.

    A field that the family's class in transformers does not have is metadata: it is named in a warning, and
    an export keeps it. Raises UserError naming a field that would change the numbers and is not understood,
    or one that is missing or of the wrong type or range.
    """
    family = choice(fields, "model_type", where, FAMILIES)
    metadata = _metadata(fields, family, where)
    choice(fields, "hidden_act", where, ("silu",), "silu")
    choice(fields, "dtype", where, STORED, None)
    choice(fields, "torch_dtype", where, STORED, None)
    vocab_size = size(fields, "vocab_size", where)
    token_ids(fields, "eos_token_id", where, vocab_size)
    hidden, heads, layers = (
        size(fields, name, where) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    bias = "attention_bias" in _READ_BY[family] and truth(fields, "attention_bias", where, False)
    window, window_layers = _sliding_window(fields, family, layers, where)
    with naming(f"{where}: "):
        config = ModelConfig(
            family=family,
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=size(fields, "intermediate_size", where),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=size(fields, "num_key_value_heads", where, heads),
            head_dim=size(fields, "head_dim", where, 128 if family == "qwen3" else max(1, hidden // heads)),
            rope=RopeConfig.from_hf(fields, where),
            rms_norm_eps=number(fields, "rms_norm_eps", where, 1e-6),
            tie_embeddings=truth(fields, "tie_word_embeddings", where, False),
            qkv_bias=family == "qwen2" or bias,
            output_bias=bias,
            mlp_bias=family == "llama" and truth(fields, "mlp_bias", where, False),
            qk_norm=family == "qwen3",
            window=window,
            window_layers=window_layers,
            max_positions=size(fields, "max_position_embeddings", where, 32768),
            initializer_range=fields.get("initializer_range", 0.02),
            source=json.dumps(dict(fields)),
        )
    warn_of_metadata(metadata, where)
    return config


def _metadata(fields: Mapping[str, Any], family: str, where: str) -> list[str]:
    """Fields that neither we nor the family's class in transformers read; UserError for those it does."""
    for name, harmless in _REFUSED.items():
        if fields.get(name) not in (None, harmless):
            raise UserError(f"{where}: field {name!r} changes the numbers and is not supported")
    unknown = sorted(set(fields) - _READ - _READ_BY[family] - _NEUTRAL - set(_REFUSED))
    if unknown:
        from transformers import AutoConfig  # takes a second, and few folders need it

        theirs = AutoConfig.for_model(family).to_dict()
        for name in unknown:
            if name in theirs:
                raise UserError(f"{where}: field {name!r} is not understood and may change the numbers")
    return unknown


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
    read = _READ_BY[config.family]
    if "attention_bias" in read:
        fields["attention_bias"] = config.qkv_bias
    if "mlp_bias" in read:
        fields["mlp_bias"] = config.mlp_bias
    if config.family == "mistral" or config.window:
        fields["sliding_window"] = config.window or None
    if "layer_types" in read and config.window:
        fields["use_sliding_window"] = True
        fields["layer_types"] = [_LAYERS[inside] for inside in config.window_layers]
    return fields


def _sliding_window(
    fields: Mapping[str, Any], family: str, layers: int, where: str
) -> tuple[int, tuple[bool, ...]]:
    """(window, which layers use it); older configs give a first layer, newer ones a list of types."""
    if family == "llama":
        return 0, ()
    # Null is no window, and no field at all the default of transformers.
    window = size(fields, "sliding_window", where, 0, least=0) if "sliding_window" in fields else 4096
    if family == "mistral":
        return window, (True,) * layers if window else ()
    wanted = truth(fields, "use_sliding_window", where, False)
    types = fields.get("layer_types")
    first = size(fields, "max_window_layers", where, 28, least=0)
    inside = [i >= first and wanted and window > 0 for i in range(layers)]
    if types is not None:
        if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= set(_LAYERS):
            raise UserError(
                f"{where}: layer_types must be a list of {layers} of {', '.join(_LAYERS)}, as many as layers"
            )
        inside = [kind == "sliding_attention" for kind in types]
        if any(inside) and not (wanted and window):
            raise UserError(
                f"{where}: layer_types has sliding_attention, and use_sliding_window or sliding_window not"
            )
    return (window, tuple(inside)) if any(inside) else (0, ())
