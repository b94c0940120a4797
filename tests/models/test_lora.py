"""Adapters against merged weights, closed forms and PyTorch; what is trained, and how it is stored."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, shard_tree
from gtalign_jax.models import hf, lora, peft_files, transformer
from gtalign_jax.models.config import ModelConfig, RuntimeConfig
from gtalign_jax.models.layers import Projection
from gtalign_jax.models.lora import LoraConfig

MODEL = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,  # 4 * 8 is not the hidden size
    tie_embeddings=False,
    initializer_range=0.3,
)
LORA = LoraConfig(rank=3, alpha=4.5)
P, G, S, N = 2, 2, 5, 4


@pytest.fixture(scope="module")
def base():
    return jax.jit(transformer.init_params, static_argnums=1)(jax.random.key(0), MODEL)


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(lora.init_adapters, static_argnums=(1, 2))(jax.random.key(1), MODEL, LORA)


@pytest.fixture(scope="module")
def params(base, fresh):
    """The model with adapters as if trained: B is not zero."""
    rng = np.random.default_rng(2)
    layers = {
        name: part | {"lora_b": jnp.asarray(rng.normal(size=part["lora_b"].shape) * 0.2, jnp.float32)}
        for name, part in fresh["layers"].items()
    }
    return lora.join(base, {"layers": layers})


def stacked(params):
    """Merged parameters as plain arrays."""
    whole = lambda x: jnp.stack([x[i] for i in range(x.shape[0])]) if isinstance(x, lora.MergedKernel) else x
    return jax.tree.map(whole, lora.merged(params))


@functools.partial(jax.jit, static_argnums=1)
def four_passes(params, config):
    """Logits or states of every way through the layers, decoding one token."""
    rng = np.random.default_rng(0)
    prompt = jnp.asarray(rng.integers(0, 31, (P, S)), jnp.int32)
    completion = jnp.asarray(rng.integers(0, 31, (P, G, N)), jnp.int32)
    length = jnp.array([5, 3], jnp.int32)
    logits, prompt_cache = transformer.prefill(params, config, prompt, length)
    cache = transformer.init_decode_cache(config, P, G, N)
    step, _ = transformer.decode_step(params, config, completion[:, :, 0], 0, prompt_cache, cache)
    return {
        "forward": transformer.forward(params, config, prompt, length)[1, :3],
        "shared": transformer.forward_shared(params, config, prompt, length, completion),
        "prefill": logits,
        "decode": step,
    }


RUNTIMES = [RuntimeConfig(), RuntimeConfig(scan_layers=False, remat="full")]


@pytest.mark.parametrize("runtime", RUNTIMES, ids=["scan", "unrolled"])
def test_adapters_compute_what_merged_weights_do(base, params, runtime):
    config = dataclasses.replace(MODEL, runtime=runtime)
    ours, want, plain = (four_passes(p, config) for p in (params, stacked(params), base))
    for name in ours:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours[name], want[name])
        assert np.abs(np.asarray(ours[name]) - np.asarray(plain[name])).max() > 0.01, name


def test_a_fresh_adapter_changes_no_bit(base, fresh):
    ours, want = (four_passes(p, MODEL) for p in (lora.join(base, fresh), base))
    jax.tree.map(np.testing.assert_array_equal, ours, want)


def test_merged_kernels_are_the_closed_form(params):
    merged = lora.merged(params)
    assert jax.tree.structure(merged) == jax.tree.structure(transformer.logical_axes(MODEL), is_leaf=is_names)
    for name in lora.TARGETS:
        part = {k: np.asarray(x, np.float64) for k, x in params["layers"][name].items()}
        for layer in range(MODEL.num_layers):
            a, b, kernel = (part[k][layer] for k in ("lora_a", "lora_b", "kernel"))
            want = kernel + 4.5 / 3 * (a.reshape(-1, 3) @ b.reshape(3, -1)).reshape(kernel.shape)
            np.testing.assert_allclose(merged["layers"][name]["kernel"][layer], want, atol=1e-6)


is_names = lambda x: isinstance(x, tuple)


@pytest.mark.parametrize("inputs", [1, 2])
def test_gradients_of_a_projection_are_the_closed_form(inputs):
    """loss = <c, x (W + s A B)>: dA = s x^T c B^T and dB = s (x A)^T c."""
    rng = np.random.default_rng(3)
    shapes = {1: ((6,), (2, 4)), 2: ((2, 3), (5,))}[inputs]
    x, c, kernel = (rng.normal(size=s) for s in ((7, *shapes[0]), (7, *shapes[1]), (*shapes[0], *shapes[1])))
    a, b = rng.normal(size=(*shapes[0], 3)), rng.normal(size=(3, *shapes[1]))
    layer = Projection(MODEL, shapes[1], ("embed",) * kernel.ndim, inputs)
    fixed = {"kernel": jnp.asarray(kernel, jnp.float32), "lora_scale": jnp.float32(1.5)}

    def loss(trained):
        return jnp.sum(layer.apply({"params": fixed | trained}, jnp.asarray(x, jnp.float32)) * c)

    trained = {"lora_a": jnp.asarray(a, jnp.float32), "lora_b": jnp.asarray(b, jnp.float32)}
    value, grads = jax.value_and_grad(loss)(trained)
    flat = lambda y, first: y.reshape(first, -1)
    x2, c2, a2, b2 = flat(x, 7), flat(c, 7), a.reshape(-1, 3), flat(b, 3)
    want = np.sum(c2 * (x2 @ (kernel.reshape(len(a2), -1) + 1.5 * a2 @ b2)))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(
        grads["lora_a"].reshape(a2.shape), 1.5 * x2.T @ c2 @ b2.T, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        grads["lora_b"].reshape(b2.shape), 1.5 * (x2 @ a2).T @ c2, rtol=1e-4, atol=1e-5
    )


def test_split_takes_the_adapters_and_join_puts_them_back(base, params):
    trained, rest = lora.split(params)
    names = {path[-1].key for path, _ in jax.tree.leaves_with_path(trained)}
    assert names == {"lora_a", "lora_b"} and list(trained) == ["layers"]
    assert rest["layers"]["query"]["kernel"] is base["layers"]["query"]["kernel"], "no array is copied"
    again = lora.join(rest, trained)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))
    whole, nothing = lora.split(base)
    assert whole is base and nothing is None and lora.join(None, base) is base


def test_fresh_adapters_are_drawn_as_peft_draws_them(fresh):
    """torch's kaiming_uniform_(a=sqrt(5)) of a Linear is uniform in +-1 / sqrt(inputs)."""
    wide = dataclasses.replace(MODEL, hidden_size=64, num_layers=3)
    drawn = lora.init_adapters(jax.random.key(0), wide, LoraConfig(rank=8))["layers"]
    theirs = torch.nn.Linear(64, 4000, bias=False)
    torch.nn.init.kaiming_uniform_(theirs.weight, a=5**0.5)
    ours = np.asarray(drawn["query"]["lora_a"])
    bound = float(theirs.weight.detach().abs().max())
    assert 0.9 * bound < np.abs(ours).max() <= 1.001 * bound
    assert ours.std() == pytest.approx(float(theirs.weight.detach().std()), rel=0.05)
    assert np.abs(drawn["output"]["lora_a"]).max() <= 1 / np.sqrt(4 * 8)
    assert not np.array_equal(ours[0], ours[1]) and not np.array_equal(ours, drawn["gate"]["lora_a"])
    assert not any(np.any(part["lora_b"]) for part in drawn.values())


def test_adapters_of_chosen_targets_are_split_over_the_mesh_as_their_kernels(base):
    config = LoraConfig(rank=3, targets=("query", "output"))
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    shapes = jax.eval_shape(lambda: lora.init_adapters(jax.random.key(0), MODEL, config))
    assert set(shapes["layers"]) == {"query", "output"}
    shardings = shard_tree(lora.adapter_axes(MODEL, config), mesh, shapes)["layers"]
    assert shardings["query"]["lora_a"].spec == PartitionSpec(None, "fsdp", None)
    assert shardings["query"]["lora_b"].spec == PartitionSpec(None, None, "tensor", None)
    assert shardings["output"]["lora_a"].spec == PartitionSpec(None, "tensor", None, None)
    assert shardings["output"]["lora_b"].spec == PartitionSpec(None, None, "fsdp")


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(params, base, tmp_path_factory):
    """base/, merged/ and adapter/ as a run writes them."""
    folder = tmp_path_factory.mktemp("lora")
    hf.save_params(base, MODEL, folder / "base")
    hf.save_params(lora.merged(params), MODEL, folder / "merged")
    trained, _ = lora.split(params)
    peft_files.save_adapters(trained, MODEL, LORA, folder / "adapter", base=str(folder / "base"))
    return folder


def test_a_peft_adapter_added_in_pytorch_gives_our_logits(params, folder):
    """W + alpha / r * B A, by the names of the files, in the model that transformers loads; so the merged."""
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert config["r"] == 3 and config["lora_alpha"] == 4.5 and config["peft_type"] == "LORA"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    modules = dict(theirs.named_modules())
    wanted = {f"{name}.weight" for name in modules if name.split(".")[-1] in config["target_modules"]}
    assert len(wanted) == 7 * MODEL.num_layers
    for name in wanted:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (torch.from_numpy(tensors.pop(f"{stem}.lora_{x}.weight")) for x in "AB")
        weight = theirs.get_parameter(name)
        assert a.shape == (3, weight.shape[1]) and b.shape == (weight.shape[0], 3)
        weight.data += config["lora_alpha"] / config["r"] * b @ a
    assert not tensors
    tokens = np.random.default_rng(5).integers(0, 31, (2, 7))
    length = jnp.array([7, 7], jnp.int32)
    hidden = transformer.forward(params, MODEL, jnp.asarray(tokens, jnp.int32), length)
    ours = transformer.unembed(params, MODEL, hidden)
    with torch.no_grad():
        for model in (theirs, merged):
            np.testing.assert_allclose(ours, model(torch.from_numpy(tokens)).logits.numpy(), atol=1e-4)


def test_merging_bfloat16_weights_rounds_once(params):
    half = jax.tree.map(lambda x: x, params)
    part = half["layers"]["up"]
    part["kernel"] = part["kernel"].astype(jnp.bfloat16)
    got = lora.merged(half)["layers"]["up"]["kernel"][1]
    added = 1.5 * np.asarray(part["lora_a"][1], np.float64) @ np.asarray(part["lora_b"][1], np.float64)
    want = jnp.asarray(np.asarray(part["kernel"][1], np.float64) + added, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    assert np.mean(np.asarray(got) == np.asarray(want)) > 0.99  # the rest are ties of float32 and float64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, "^rank=-1: must be 0"),
        ({"alpha": 0.0}, "^alpha=0.0: must be positive"),
        ({"targets": ("query", "q_proj")}, "^targets: 'q_proj' is not one of query"),
        ({"targets": ()}, "name one projection or more"),
        ({"targets": ("up", "up")}, "each once"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)
