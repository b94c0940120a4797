"""Import and export one checkpoint at full size, and prove both: bit-equal files, printed peak memory.

    python -m experiments.check_large_checkpoint [--folder=DIR] [--limit_gb=16] [--layers=36]

Writes a Qwen2.5-3B-shaped checkpoint of random bfloat16 numbers with the safetensors library (6.2 GB), reads
it onto the first device, writes it again (another 6.2 GB), compares the files byte by byte and removes
both. Prints one JSON line: bytes, seconds of each part, peak_gb (of the process that imports and exports,
model included), equal. Exits with 1 when a file differs or the peak is over the limit.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import multiprocessing
import pathlib
import resource
import shutil
import sys
import tempfile
import time

from gtalign_jax.errors import UserError, exit_on_user_error

QWEN2_5_3B = {
    "architectures": ["Qwen2ForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
SHARD_BYTES = 2**30


def write_checkpoint(folder: pathlib.Path, fields: dict) -> None:
    """A random checkpoint with these config fields, a shard in memory at a time."""
    import numpy as np
    from ml_dtypes import bfloat16
    from safetensors.numpy import save_file

    rng, shapes = np.random.default_rng(0), tensor_shapes(fields)
    shards: list[list[str]] = [[]]
    for name in sorted(shapes):
        if sum(2 * int(np.prod(shapes[n])) for n in [*shards[-1], name]) > SHARD_BYTES and shards[-1]:
            shards.append([])
        shards[-1].append(name)
    folder.mkdir(parents=True)
    where: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"

        def draw(shape: tuple[int, ...]) -> np.ndarray:
            return rng.integers(0, 0x7F00, shape, np.uint16).view(bfloat16)  # any finite number

        save_file({n: draw(shapes[n]) for n in names}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
        total += (folder / file).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(fields))


def tensor_shapes(fields: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen2 checkpoint with tied embeddings, as the family's files have them."""
    hidden, inner = fields["hidden_size"], fields["intermediate_size"]
    kv = hidden // fields["num_attention_heads"] * fields["num_key_value_heads"]
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    shapes = {"model.embed_tokens.weight": (fields["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for i in range(fields["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def measure(source: pathlib.Path, out: pathlib.Path) -> dict[str, float]:
    """Seconds and peak memory of importing `source` and exporting it to `out`."""
    import jax

    from gtalign_jax.models import hf
    from gtalign_jax.models.config import RuntimeConfig, read_config

    def peak() -> float:
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)

    jax.devices()
    marks, clock = {"start_gb": peak()}, time.monotonic()
    config = read_config(source, RuntimeConfig(param_dtype="bfloat16"))
    params = jax.block_until_ready(hf.load_params(source, config))
    marks |= {"import_s": round(time.monotonic() - clock, 1), "import_peak_gb": peak()}
    marks["model_gb"] = round(sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**30, 2)
    clock = time.monotonic()
    hf.save_params(params, config, out, max_shard_bytes=SHARD_BYTES)
    return marks | {"export_s": round(time.monotonic() - clock, 1), "peak_gb": peak()}


def differing(source: pathlib.Path, out: pathlib.Path) -> list[str]:
    """Safetensors files that are not byte for byte the same in both folders."""
    names = {path.name for folder in (source, out) for path in folder.glob("*.safetensors")}

    def same(name: str) -> bool:
        return all((f / name).is_file() for f in (source, out)) and filecmp.cmp(
            source / name, out / name, shallow=False
        )

    return sorted(name for name in names if not same(name))


@exit_on_user_error
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to put some 13 GB")
    parser.add_argument("--limit_gb", type=float, default=16.0)
    parser.add_argument("--layers", type=int, default=36)
    flags = parser.parse_args(argv)
    fields = QWEN2_5_3B | {"num_hidden_layers": flags.layers}
    work = pathlib.Path(tempfile.mkdtemp(prefix="large_checkpoint_", dir=flags.folder))
    try:
        run = multiprocessing.get_context("spawn").Process(
            target=write_checkpoint, args=(work / "source", fields)
        )
        run.start()  # in a process of its own: its memory is not what is measured
        run.join()
        if run.exitcode:
            raise UserError(f"--folder={flags.folder}: the checkpoint could not be written; is there room?")
        marks = measure(work / "source", work / "out")
        wrong = differing(work / "source", work / "out")
        size = sum(path.stat().st_size for path in (work / "source").glob("*.safetensors"))
    finally:
        shutil.rmtree(work)
    print(json.dumps({"bytes": size, **marks, "equal": not wrong, "differing": wrong}))
    if wrong or marks["peak_gb"] > flags.limit_gb:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
