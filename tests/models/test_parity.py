"""Numbers against PyTorch transformers: every family, odd shapes, ragged rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from gtalign_jax.errors import UserError
from gtalign_jax.models import hf, layouts, transformer
from gtalign_jax.models.config import RuntimeConfig, from_hf, read_config
from gtalign_jax.models.cpu import FeatureWeights
from gtalign_jax.rollout import programs
from gtalign_jax.rollout.request import Ending, Placed, Rules
from gtalign_jax.rollout.sampling import GREEDY
from gtalign_jax.types import PromptBatch

BASE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    attn_implementation="eager",
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2_untied_one_kv_head": ("Qwen2", dict(num_key_value_heads=1, tie_word_embeddings=False)),
    "qwen2_window": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=5, max_window_layers=1, rope_theta=500.0),
    ),
    "qwen2_yarn": ("Qwen2", dict(rope_parameters=YARN)),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3_bias": ("Qwen3", dict(head_dim=12, attention_bias=True)),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, rms_norm_eps=1e-3)),
    "llama_linear_biases": (
        "Llama",
        dict(
            rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    "mistral": ("Mistral", dict(sliding_window=None, head_dim=16)),
    "mistral_window": ("Mistral", dict(sliding_window=5)),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(PyTorch model, our config, our params, folder): the same random weights."""
    name, extra = CASES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**BASE | extra)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for norm in [m for n, m in theirs.named_parameters() if "norm" in n or n.endswith("bias")]:
        norm.data.normal_(1.0, 0.3)  # ones and zeros would hide a missing scale or bias
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    ours = read_config(folder)
    return theirs, ours, hf.load_params(folder, ours), folder


def rows(seed=0, lengths=(23, 40, 1, 31)):
    rng = np.random.default_rng(seed)
    tokens = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = rng.integers(1, 97, length)
    return tokens, np.array(lengths, np.int32)


def their_logits(model, tokens, length):
    with torch.no_grad():
        return [
            model(torch.tensor(row[None, :n])).logits[0].numpy()
            for row, n in zip(tokens.astype(np.int64), length, strict=True)
        ]


def test_logits_equal_transformers_on_ragged_rows(pair):
    theirs, config, params, _ = pair
    tokens, length = rows()
    hidden = jax.jit(transformer.forward, static_argnums=1)(params, config, tokens, length)
    logits = np.asarray(transformer.unembed(params, config, hidden))
    for row, n, expected in zip(logits, length, their_logits(theirs, tokens, length), strict=True):
        np.testing.assert_allclose(row[:n], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("layout", ["rows", "features"])
def test_prefill_and_decode_equal_transformers(pair, layout):
    theirs, config, params, _ = pair
    config = dataclasses.replace(config, runtime=RuntimeConfig(decode_layout=layout))
    tokens, length = rows()
    completion = np.random.default_rng(1).integers(1, 97, (4, 2, 9)).astype(np.int32)
    logits, prompt_cache = jax.jit(layouts.prefill, static_argnums=1)(params, config, tokens, length)
    cache = layouts.init_decode_cache(params, config, 4, 2, 9)
    params = layouts.prepare_decode(params, config)
    assert isinstance(params, FeatureWeights) == (layout == "features")
    step = jax.jit(layouts.decode_step, static_argnums=1)
    steps = [np.broadcast_to(logits[:, None], (4, 2, 97))]
    for t in range(8):
        out, cache = step(params, config, completion[:, :, t], t, prompt_cache, cache)
        steps.append(np.asarray(out))
    ours = np.stack(steps, axis=2)
    for p in range(4):
        for g in range(2):
            row = np.concatenate([tokens[p, : length[p]], completion[p, g]])[None]
            expected = their_logits(theirs, row, [row.shape[1]])[0][length[p] - 1 : -1]
            np.testing.assert_allclose(ours[p, g], expected, atol=1e-4 * np.abs(expected).max())


def test_64_greedy_tokens_are_those_of_transformers(pair):
    theirs, config, params, _ = pair
    tokens, length = rows(seed=4, lengths=(7, 12))
    placed = Placed(PromptBatch(tokens, length), jax.random.key(0), group_size=1, slots=64)
    never = Rules(Ending(np.array([-1], np.int32)))
    ours = programs.generate(params, config, placed, GREEDY, never).completions.tokens
    theirs.generation_config.update(eos_token_id=None, pad_token_id=0)
    for row, n, got in zip(tokens, length, np.asarray(ours)[:, 0], strict=True):
        ids = torch.tensor(row[None, :n].astype(np.int64))
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False
        )
        np.testing.assert_array_equal(got, expected[0, n:].numpy())


def test_export_is_bit_equal_in_transformers(pair, tmp_path):
    theirs, config, params, _ = pair
    hf.save_params(params, config, tmp_path / "out", max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    mine, original = again.state_dict(), theirs.state_dict()
    assert mine.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(mine[name], tensor), name


def test_shared_prompt_equals_separate_rows_with_gradients(pair):
    _, config, params, _ = pair
    prompt, length = rows(lengths=(7, 12, 1))
    completion = np.random.default_rng(2).integers(1, 97, (3, 2, 6)).astype(np.int32)
    joined = np.zeros((6, 18), np.int32)
    for row in range(6):
        n = length[row // 2]
        joined[row, :n] = prompt[row // 2, :n]
        joined[row, n : n + 6] = completion[row // 2, row % 2]
    weight = np.random.default_rng(3).normal(size=(3, 2, 6, 32)).astype(np.float32)

    def shared(p, runtime=config.runtime):
        changed = dataclasses.replace(config, runtime=runtime)
        return transformer.forward_shared(p, changed, prompt, length, completion)

    def unrolled(p):  # knows its last layer, where most of a prompt is not computed
        return shared(p, RuntimeConfig(scan_layers=False))

    def separate(p):
        hidden = transformer.forward(p, config, joined, np.repeat(length, 2) + 6)
        take = (np.repeat(length, 2) - 1)[:, None] + np.arange(6)
        return jnp.take_along_axis(hidden, take[..., None], axis=1).reshape(3, 2, 6, 32)

    run = lambda f: jax.jit(jax.value_and_grad(lambda p: jnp.sum(f(p) * weight)))(params)
    expected, expected_grads = run(separate)
    for way in (shared, unrolled):
        value, grads = run(way)
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def test_scan_unroll_and_remat_agree(pair):
    _, config, params, _ = pair
    tokens, length = rows(lengths=(9, 4))
    loss = lambda p, c: jnp.sum(jnp.sin(transformer.forward(p, c, tokens, length)))
    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, grads = both(params, config)
    for other in ({"scan_layers": False}, {"remat": "dots"}, {"remat": "full"}):
        again, again_grads = both(params, dataclasses.replace(config, runtime=RuntimeConfig(**other)))
        np.testing.assert_allclose(value, again, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(again_grads), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def test_bfloat16_is_close(pair):
    theirs, config, params, _ = pair
    tokens, length = rows(lengths=(20,))
    low = dataclasses.replace(config, runtime=RuntimeConfig(compute_dtype="bfloat16"))
    hidden = jax.jit(transformer.forward, static_argnums=1)(params, low, tokens, length)
    logits = transformer.unembed(params, low, hidden)
    expected = their_logits(theirs.to(torch.float32), tokens, length)[0]
    error = np.linalg.norm(np.asarray(logits[0]) - expected) / np.linalg.norm(expected)
    assert error < 2e-2


def test_packed_segments_equal_separate_rows():
    config = from_hf({"model_type": "qwen2", **{k: v for k, v in BASE.items() if k != "attn_implementation"}})
    params = jax.jit(transformer.init_params, static_argnums=1)(jax.random.key(0), config)
    a, b = rows(lengths=(6,))[0], rows(1, lengths=(5,))[0]
    packed = np.concatenate([a, b], axis=1)
    segments = np.repeat([0, 1], [6, 5])[None]
    positions = np.concatenate([np.arange(6), np.arange(5)])[None]
    forward = jax.jit(transformer.forward, static_argnums=1)
    hidden = forward(params, config, packed, np.array([11]), segment_ids=segments, positions=positions)
    np.testing.assert_allclose(hidden[:, :6], forward(params, config, a, np.array([6])), atol=1e-5)
    np.testing.assert_allclose(hidden[:, 6:], forward(params, config, b, np.array([5])), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"logit_softcap": 30.0}, "logit_softcap"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
    ],
)
def test_unsupported_fields_are_refused_by_name(change, named):
    fields = {"model_type": "qwen2", **{k: v for k, v in BASE.items() if k != "attn_implementation"}}
    with pytest.raises(UserError, match=named):
        from_hf(fields | change)


def test_missing_tensor_and_folder_are_named(tmp_path, pair):
    _, config, params, _ = pair
    with pytest.raises(UserError, match="no such model folder"):
        hf.resolve_folder(str(tmp_path / "absent"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"x.gguf: a GGUF file; python -m experiments.fetch_model .*x.gguf"):
        hf.resolve_folder(str(tmp_path / "x.gguf"))
    short = {**params, "layers": jax.tree.map(lambda x: x[:2], params["layers"])}
    hf.save_params(short, dataclasses.replace(config, num_layers=2), tmp_path / "short")
    with pytest.raises(UserError, match="model.layers.2"):
        hf.load_params(tmp_path / "short", config)
