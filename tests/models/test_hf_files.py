"""Checkpoint files in and out: to the bit for every family, by slices, and with faults that are named."""

import json
import pathlib
import shutil

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from gtalign_jax.errors import UserError
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, shard_tree
from gtalign_jax.models import hf, stored, transformer
from gtalign_jax.models.config import RuntimeConfig, read_config

BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)
FAMILIES = {
    "qwen2_tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2_untied_one_kv_head": ("Qwen2", dict(num_key_value_heads=1, tie_word_embeddings=False)),
    "qwen3_wide_heads": ("Qwen3", dict(head_dim=16, attention_bias=True)),
    "llama_biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
}


def write_with_transformers(folder, family, dtype):
    name, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**BASE | extra)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for norm in [p for n, p in model.named_parameters() if "norm" in n or n.endswith("bias")]:
        norm.data.normal_(1.0, 0.3)  # ones and zeros would look right in any order
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(family, dtype): a sharded checkpoint that transformers wrote, made once."""
    made = {}

    def get(family="qwen2_untied_one_kv_head", dtype="bfloat16"):
        if (family, dtype) not in made:
            made[family, dtype] = write_with_transformers(tmp_path_factory.mktemp(family), family, dtype)
        return made[family, dtype]

    return get


def tensors(folder):
    """Every tensor of a folder, read by the safetensors library."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, dtype) for family in FAMILIES for dtype in ("float32", "bfloat16")),
        ("qwen2_tied", "float16"),
    ],
)
def test_import_and_export_keep_every_bit(folder, tmp_path, family, dtype):
    """Held in the stored type, and in float32, which holds every smaller number exactly."""
    source = folder(family, dtype)
    for held in {dtype, "float32"}:
        config = read_config(source, RuntimeConfig(param_dtype=held))
        params = hf.load_params(source, config)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {held}
        out = tmp_path / held
        hf.save_params(params, config, out, max_shard_bytes=30_000)
        assert_same_bits(tensors(out), tensors(source))
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert sorted(index["weight_map"]) == sorted(tensors(source))
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(source).values())


def test_the_export_says_its_type_and_takes_another(folder, tmp_path):
    source = folder()
    config = read_config(source)  # held in float32
    params = hf.load_params(source, config)
    hf.save_params(params, config, tmp_path / "as_it_was")
    hf.save_params(params, config, tmp_path / "wide", dtype="float32")
    says = lambda name: json.loads((tmp_path / name / "config.json").read_text())["dtype"]
    assert (says("as_it_was"), says("wide")) == ("bfloat16", "float32")
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    narrow = tensors(source)
    for name, tensor in wide.state_dict().items():
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), narrow[name].astype(np.float32))
    with pytest.raises(UserError, match="dtype='int8'"):
        hf.save_params(params, config, tmp_path / "tiny", dtype="int8")
    assert not (tmp_path / "tiny").exists()


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"  # what the format keeps for itself
)


@hypothesis.given(
    shapes=st.dictionaries(NAMES, st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
@hypothesis.settings(max_examples=50)
def test_written_files_are_those_of_the_library(tmp_path_factory, shapes, dtype):
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}
    save_file(arrays, folder / "theirs", metadata={"format": "pt"})
    stored.write_file(folder / "ours", shapes, dtype, (arrays[name] for name in sorted(arrays)))
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


# --- by slices -----------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Bytes read so far, per tensor."""
    counted: dict[str, int] = {}

    def count(tensor, index, read=stored.read_slice):
        part = read(tensor, index)
        counted[tensor.name] = counted.get(tensor.name, 0) + part.nbytes
        return part

    monkeypatch.setattr(stored, "read_slice", count)
    return counted


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=2, context=2), MeshConfig(data=4, tensor=2)],
    ids=["fsdp", "fsdp_tensor_context", "data_tensor"],
)
def test_eight_devices_hold_what_one_does_and_read_it_once(folder, reads, mesh):
    source = folder("qwen3_wide_heads")
    config = read_config(source, RuntimeConfig(param_dtype="bfloat16"))
    plain = hf.load_params(source, config)
    once, size = dict(reads), {name: t.nbytes for name, t in tensors(source).items()}
    assert once == size
    reads.clear()
    shardings = shard_tree(transformer.logical_axes(config), make_mesh(mesh), hf.abstract_params(config))
    split = hf.load_params(source, config, shardings)
    assert reads == size
    for leaf, sharding, expected in zip(*map(jax.tree.leaves, (split, shardings, plain)), strict=True):
        assert leaf.sharding == sharding
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index])


def test_any_axis_may_be_split(folder):
    """Also inside a head and over layers, which no rule of ours does."""
    source = folder("llama_biases")
    config = read_config(source)
    plain = hf.load_params(source, config)
    mesh = make_mesh(MeshConfig(fsdp=2))

    def last_axis(leaf):
        axis = 0 if leaf.shape[0] == 4 else leaf.ndim - 1
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    split = hf.load_params(source, config, jax.tree.map(last_axis, plain))
    for leaf, expected in zip(jax.tree.leaves(split), jax.tree.leaves(plain), strict=True):
        assert not leaf.sharding.is_fully_replicated
        np.testing.assert_array_equal(leaf, expected)


def test_a_host_reads_only_what_its_devices_hold(folder, reads):
    """Two of eight devices are this host's: a quarter of everything but biases, which are not split."""
    source = folder()
    config = read_config(source, RuntimeConfig(param_dtype="bfloat16"))
    mesh = make_mesh(MeshConfig(fsdp=8))
    headers, table = stored.read_headers(source), hf.name_table(config)
    shardings = shard_tree(transformer.logical_axes(config), mesh, hf.abstract_params(config))
    for entry, leaf, sharding in zip(
        jax.tree.leaves(table, is_leaf=hf.is_entry),
        jax.tree.leaves(hf.abstract_params(config)),
        jax.tree.leaves(shardings),
        strict=True,
    ):
        held = sharding.addressable_devices_indices_map(leaf.shape)
        mine = {device: held[device] for device in list(mesh.devices.flat)[:2]}
        parts = hf.read_parts(entry, leaf, mine, headers)
        assert sum(len(devices) for _, devices in parts) == 2
    share = lambda name, nbytes: nbytes if name.endswith("bias") else nbytes // 4
    assert reads == {name: share(name, tensor.nbytes) for name, tensor in tensors(source).items()}


def test_loaded_parameters_may_be_donated(folder):
    """Devices that hold the same part were given one host buffer: a step in place must not spoil it."""
    source = folder()
    config = read_config(source)
    expected = jax.tree.map(np.array, hf.load_params(source, config))
    everywhere = NamedSharding(make_mesh(MeshConfig(data=8)), PartitionSpec())
    params = hf.load_params(source, config, jax.tree.map(lambda _: everywhere, expected))
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = step(step(params))
    for leaf, start in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        for shard in leaf.addressable_shards:
            np.testing.assert_allclose(shard.data, start + 2, rtol=1e-6)


# --- faults --------------------------------------------------------------------------------------


def edit(folder, tmp_path, change):
    """A copy of a checkpoint as one file with `change` done to its tensors."""
    held = tensors(folder)
    change(held)
    out = tmp_path / "edited"
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    save_file(held, out / "model.safetensors")
    return out


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(DOWN), f"tensor {DOWN} is missing"),
        (lambda t: t.update({DOWN: t[DOWN].T.copy()}), rf"{DOWN} has shape \(48, 32\), config.json says"),
        (lambda t: t.update({DOWN: t[DOWN].view(np.int16)}), f"{DOWN} is stored as I16"),
        (lambda t: t.update(extra=np.zeros(3, ml_dtypes.bfloat16)), "tensor extra is in the checkpoint but"),
    ],
    ids=["missing", "transposed", "quantized", "superfluous"],
)
def test_a_wrong_tensor_is_named(folder, tmp_path, change, message):
    source = edit(folder(), tmp_path, change)
    with pytest.raises(UserError, match=message) as error:
        hf.load_params(source, read_config(source))
    assert "\n" not in str(error.value)


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "{0}: not found, but model.safetensors.index.json names it"),
        (cut, "{0}: damaged"),
        (lambda file: file.write_bytes(b""), "{0}: damaged"),
        (lambda file: save_file({"a": np.zeros(2)}, file), "{0}: .* is not in it"),
    ],
    ids=["gone", "cut", "empty", "another"],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    source = write_with_transformers(tmp_path, "qwen2_tied", "bfloat16")
    file = sorted(source.glob("*.safetensors"))[1]
    damage(file)
    with pytest.raises(UserError, match=message.format(file.name)) as error:
        hf.load_params(source, read_config(source))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.float32(np.nan)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_number_that_is_not_finite_names_its_tensor(folder, tmp_path, dtype, value):
    def change(t):
        t.update({name: array.astype(dtype) for name, array in t.items()})
        t[DOWN].reshape(-1)[7] = value

    source = edit(folder(), tmp_path, change)
    with pytest.raises(UserError, match=f"model.safetensors: {DOWN} holds NaN or infinity"):
        hf.load_params(source, read_config(source))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_largest_and_smallest_numbers_are_finite(folder, tmp_path, dtype):
    limits = jnp.finfo(dtype)

    def change(t):
        t.update({name: array.astype(dtype) for name, array in t.items()})
        t[DOWN].reshape(-1)[:4] = [limits.max, limits.min, limits.smallest_subnormal, -0.0]

    source = edit(folder(), tmp_path, change)
    assert jax.tree.leaves(hf.load_params(source, read_config(source)))


def test_tensors_that_share_bytes_are_damage(tmp_path):
    """Also when the file is as long as all of them together."""
    save_file({"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    for ours, theirs in ((b"[8,16]", b"[0,8] "), (b"[8,16]", b"[4,12]"), (b"[0,8]", b"[0,9]")):
        assert ours in data
        (tmp_path / "model.safetensors").write_bytes(data.replace(ours, theirs))
        with pytest.raises(UserError, match="model.safetensors: damaged"):
            stored.read_headers(tmp_path)


def test_a_single_file_goes_before_an_older_index_as_in_transformers(folder, tmp_path, caplog):
    source = shutil.copytree(folder("qwen2_tied"), tmp_path / "both")
    new = {name: array * 2 for name, array in tensors(source).items()}
    assert (source / "model.safetensors.index.json").is_file()
    save_file(new, source / "model.safetensors", metadata={"format": "pt"})
    config = read_config(source, RuntimeConfig(param_dtype="bfloat16"))
    ours = hf.load_params(source, config)["embedding"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source).get_input_embeddings().weight
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.detach().float().numpy())
    np.testing.assert_array_equal(ours, new["model.embed_tokens.weight"])
    assert "model.safetensors is read and not the shards of model.safetensors.index.json" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ('{"weight_map": 3}', "weight_map must name the file of each tensor"),
        ('{"weight_map": {"a": 3}}', "weight_map must name the file of each tensor"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "is not the name of a file beside it"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=f"index.json: .*{message}"):
        stored.read_headers(tmp_path)
    with pytest.raises(UserError, match="other formats are not read"):
        stored.read_headers(pathlib.Path(tmp_path, "absent"))


class BrokenTokenizer:
    def save_pretrained(self, folder):
        raise OSError("no space left")


def test_a_failed_export_leaves_the_one_before(folder, tmp_path):
    source = folder()
    config = read_config(source)
    params = hf.load_params(source, config)
    hf.save_params(params, config, tmp_path / "hf")
    zeros = jax.tree.map(jnp.zeros_like, params)
    with pytest.raises(OSError, match="no space"):
        hf.save_params(zeros, config, tmp_path / "hf", tokenizer=BrokenTokenizer())
    assert_same_bits(tensors(tmp_path / "hf"), tensors(source))
    hf.save_params(zeros, config, tmp_path / "hf")
    assert not any(tensor.any() for tensor in tensors(tmp_path / "hf").values())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
