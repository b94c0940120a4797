"""The config.json of folders that people have: what is read of it, what is only kept, what is refused."""

import json
import logging
import pathlib
import re
import types

import pytest
import transformers

from gtalign_jax.errors import UserError
from gtalign_jax.models.config import ModelConfig, from_hf, read_config, to_hf
from gtalign_jax.models.rope import RopeConfig

BASE = {
    "model_type": "qwen2",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# As published, without the fields that name who wrote them. What they are documented as: docs/models.md.
REAL = {
    "Qwen2.5-0.5B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
        "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True,
        "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen2.5-7B-Instruct with YaRN": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
        "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
        "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "Llama-3.1-8B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
    },
    "Llama-3.2-1B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": {**LLAMA3, "factor": 32.0}, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
        "use_cache": True, "vocab_size": 128256,
    },
    "Llama-3.2-1B-Instruct by Unsloth": {
        "_name_or_path": "meta-llama/Llama-3.2-1B-Instruct", "architectures": ["LlamaForCausalLM"],
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128009,
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pad_token_id": 128004, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {**LLAMA3, "factor": 32.0}, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.47.0.dev0", "unsloth_fixed": True,
        "use_cache": True, "vocab_size": 128256,
    },
    "SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "use_cache": True, "vocab_size": 49152,
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02,
        "intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 21,
        "model_type": "qwen2", "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.44.0", "use_cache": True,
        "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "DeepSeek-R1-Distill-Llama-8B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
    "Mistral-7B-Instruct-v0.1": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "Mistral-7B-Instruct-v0.3": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0", "use_cache": True,
        "vocab_size": 32768,
    },
}  # fmt: skip
# Fields of these that are metadata.
KEPT = {
    "Qwen2.5-0.5B-Instruct": "use_mrope",
    "Llama-3.2-1B-Instruct by Unsloth": "unsloth_fixed",
    "SmolLM2-135M-Instruct": "is_llama_config, rope_interleaved, transformers.js_config",
    "DeepSeek-R1-Distill-Qwen-1.5B": "use_mrope",
}


def theirs(fields):
    """The config that transformers reads from these fields."""
    return transformers.AutoConfig.for_model(**json.loads(json.dumps(fields)))


@pytest.mark.parametrize("name", REAL)
def test_a_published_config_loads_as_transformers_reads_it_and_is_kept(name, tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps(REAL[name]))
    with caplog.at_level(logging.WARNING):
        ours = read_config(tmp_path)
    assert [m.partition("kept and not read: ")[2] for m in caplog.messages] == [
        *([KEPT[name]] if name in KEPT else [])
    ]
    expected = theirs(REAL[name])
    assert to_hf(ours) == REAL[name]
    assert (ours.num_layers, ours.num_heads) == (expected.num_hidden_layers, expected.num_attention_heads)
    assert (ours.num_kv_heads, ours.rms_norm_eps) == (expected.num_key_value_heads, expected.rms_norm_eps)
    assert ours.head_dim == getattr(expected, "head_dim", ours.hidden_size // ours.num_heads)
    assert ours.tie_embeddings == expected.tie_word_embeddings
    assert (ours.rope.theta, ours.rope.kind) == (
        expected.rope_parameters["rope_theta"],
        expected.rope_parameters["rope_type"],
    )
    assert (ours.window or None) == getattr(expected, "sliding_window", None)


def test_the_page_about_models_lists_these_configs():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| `(\w+)` \|", page, flags=re.MULTILINE)
    assert rows == [(name, fields["model_type"]) for name, fields in REAL.items()]


METADATA = {
    "_model_name_or_path": "somewhere",
    "unk_token_id": 3,
    "use_mrope": False,
    "unsloth_fixed": True,
    "is_llama_config": True,
    "auto_map": {"AutoModel": "mine.Model"},
    "rope_interleaved": False,
    "anything": [1, {"deep": None}],
}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_fields_that_transformers_does_not_have_are_named_in_one_warning_and_kept(family, caplog):
    plain = from_hf(BASE | {"model_type": family})
    with caplog.at_level(logging.WARNING):
        config = from_hf(BASE | {"model_type": family} | METADATA)
    assert config == plain and to_hf(config) == BASE | {"model_type": family} | METADATA
    (line,) = caplog.messages
    assert line == f"config.json: kept and not read: {', '.join(sorted(METADATA))}"


def test_fields_of_another_family_are_metadata(caplog):
    fields = {"mlp_bias": True, "attention_bias": True, "sliding_window": 8, "use_sliding_window": True}
    config = from_hf(BASE | fields)
    assert config.window == 0 and not config.output_bias and not config.mlp_bias  # of the first 28 layers
    assert caplog.messages == ["config.json: kept and not read: attention_bias, mlp_bias"]
    assert from_hf(BASE | fields | {"model_type": "llama"}).window == 0


def test_rope_fields_that_the_kind_does_not_have_are_metadata(caplog):
    plain = from_hf(BASE | {"rope_scaling": YARN})
    odd = from_hf(BASE | {"rope_scaling": YARN | {"attn_factor": 1.0, "finetuned": True, "type": "yarn"}})
    assert odd.rope == plain.rope
    assert caplog.messages == ["config.json: rope: kept and not read: attn_factor, finetuned"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_every_field_of_the_class_in_transformers_is_understood(family, caplog):
    """Also of a newer release: a field it learns is refused here until somebody has looked at it."""
    config = transformers.AutoConfig.for_model(family)
    fields = {name: value for name, value in config.to_dict().items() if value is not None}
    assert from_hf(fields).num_layers == config.num_hidden_layers
    assert not caplog.messages


def test_a_field_that_the_class_reads_and_we_do_not_is_refused(monkeypatch):
    newer = types.SimpleNamespace(to_dict=lambda: transformers.Qwen2Config().to_dict() | {"temper": 1.0})
    monkeypatch.setattr(transformers.AutoConfig, "for_model", lambda _: newer)
    with pytest.raises(UserError, match="field 'temper' is not understood and may change the numbers"):
        from_hf(BASE | {"temper": 2.0})


REFUSED = [
    ({"quantization_config": {"quant_method": "gptq"}}, "'quantization_config' changes the numbers"),
    ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' changes the numbers"),
    ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "rope: field 'partial_rotary_factor' changes"),
    ({"logit_scale": 0.1}, "'logit_scale' changes the numbers"),
    ({"is_causal": False}, "'is_causal' changes the numbers"),
    ({"model_type": ["qwen2"]}, r"model_type \['qwen2'\] is not supported; use one of qwen2"),
    ({"model_type": None}, "model_type is missing"),
    ({"hidden_act": 3}, "hidden_act 3 is not supported; use one of silu"),
    ({"torch_dtype": "int8"}, "torch_dtype 'int8' is not supported"),
    ({"dtype": ["float32"]}, "dtype .* is not supported"),
    *(
        ({name: value}, rf"{name}\S* .*(must be a whole number|is missing)")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        for value in (0, -1, 1.5, "3", True, [3], {}, None, 1e400)
    ),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be a whole number"),
    ({"num_key_value_heads": 3}, "num_kv_heads=3: must divide num_heads=4"),
    ({"head_dim": 7}, "head_dim=7: must be even"),
    ({"max_position_embeddings": "2k"}, "max_position_embeddings='2k' must be a whole number"),
    *(
        ({"rms_norm_eps": value}, "rms_norm_eps=.* must be a finite number above 0")
        for value in (0, -1e-6, float("nan"), float("inf"), "1e-6", [1e-6])
    ),
    *(
        ({"rope_theta": value}, "rope_theta=.* must be a finite number above 0")
        for value in (0, -1, "10000", [1], float("nan"), True)
    ),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta=0 must be a finite number"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
    ({"initializer_range": "x"}, "initializer_range='x': must be a number"),
    ({"rope_scaling": [4.0]}, "rope_scaling must be an object"),
    ({"rope_scaling": {"rope_type": 3}}, "rope_type 3 is not supported"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "for each type of layer"),
    *(
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != name}}, f"rope llama3: {name} is missing")
        for name in list(LLAMA3)[1:]
    ),
    ({"rope_scaling": {"rope_type": "yarn"}, "max_position_embeddings": 64}, "rope yarn: factor is missing"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope linear: factor is missing"),
    ({"rope_scaling": YARN | {"factor": 0}}, "factor=0 must be a finite number above 0"),
    ({"rope_scaling": YARN | {"factor": "4"}}, "factor='4' must be a finite number above 0"),
    ({"rope_scaling": YARN | {"truncate": 1}}, "truncate=1 must be true or false"),
    ({"use_sliding_window": 1}, "use_sliding_window=1 must be true or false"),
    ({"use_sliding_window": True, "sliding_window": -4}, "sliding_window=-4 must be a whole number"),
    ({"use_sliding_window": True, "sliding_window": "x"}, "sliding_window='x' must be a whole number"),
    ({"use_sliding_window": True, "max_window_layers": 1.5}, "max_window_layers=1.5 must be a whole number"),
    *(
        ({"use_sliding_window": True, "layer_types": types}, "layer_types must be a list of 3 of full_att")
        for types in (["sliding_attention"], "sliding", ["a", "b", "c"], [1, 2, 3], {}, [[], [], []])
    ),
    ({"layer_types": ["sliding_attention"] * 3}, "layer_types has sliding_attention, and use_sliding_window"),
    ({"model_type": "mistral", "sliding_window": 1.5}, "sliding_window=1.5 must be a whole number"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_field_of_the_wrong_type_or_range_is_one_line_that_names_it(change, message):
    with pytest.raises(UserError, match=f"^config.json: .*{message}") as error:
        from_hf(BASE | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", list(BASE)[:-1])
def test_a_field_that_is_missing_is_named(name):
    with pytest.raises(UserError, match=f"config.json: {name} is missing"):
        from_hf({key: value for key, value in BASE.items() if key != name})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "must be a JSON object; mend the file"),
        (b"3", "must be a JSON object"),
        (b"{", "not JSON .*; mend the file"),
        (b"", "not JSON"),
        (b'{"model_type": "\xff"}', "not UTF-8"),
        (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", "nested"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "digits"),
        (None, "Is a directory"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=f"config.json: .*{message}") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "window", "layers"),
    [
        ({}, 0, ()),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, 8, (False, True, True)),
        ({"use_sliding_window": True, "max_window_layers": 2}, 4096, (False, False, True)),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1}, 0, ()),
        ({"use_sliding_window": True, "sliding_window": 8}, 0, ()),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            8,
            (False, True, False),
        ),
        ({"model_type": "mistral"}, 4096, (True,) * 3),
        ({"model_type": "mistral", "sliding_window": None}, 0, ()),
    ],
)
def test_windows_are_those_of_transformers(change, window, layers):
    ours, expected = from_hf(BASE | change), theirs(BASE | change)
    assert (ours.window, ours.window_layers) == (window, layers)
    if ours.family == "mistral":
        assert (expected.sliding_window or 0) == window
    else:
        assert tuple(kind == "sliding_attention" for kind in expected.layer_types) == (layers or (False,) * 3)


def test_a_scaling_in_both_places_is_read_as_transformers_does():
    fields = BASE | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": YARN}
    assert RopeConfig.from_hf(fields, "").kind == theirs(fields).rope_parameters["rope_type"] == "linear"


@pytest.mark.parametrize(
    "made",
    [
        ModelConfig(),
        ModelConfig(family="qwen3", qkv_bias=False, qk_norm=True),
        ModelConfig(window=8, window_layers=(False, True, True, False)),
        ModelConfig(family="llama", qkv_bias=False),
        ModelConfig(family="mistral", qkv_bias=False),
        ModelConfig(family="mistral", qkv_bias=False, window=8, window_layers=(True,) * 4),
    ],
    ids=lambda made: f"{made.family}_{made.window}",
)
def test_a_model_made_here_is_the_same_when_it_is_read(made):
    again, expected = from_hf(to_hf(made)), theirs(to_hf(made))
    assert again == made
    assert (getattr(expected, "sliding_window", None) or 0) == made.window


def test_what_a_family_does_not_have_is_refused():
    with pytest.raises(ValueError, match="window=8: a llama model has none"):
        ModelConfig(family="llama", window=8, window_layers=(True,) * 4)
    with pytest.raises(ValueError, match="qkv_bias, .*: a mistral model has none"):
        ModelConfig(family="mistral")
