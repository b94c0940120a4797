"""Environments of the peers, and a peer's process as a contender of a benchmark."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, pre_tokenizers

from experiments import bench_common as common
from experiments.bench_common import Workload
from gtalign_jax.errors import UserError

HERE = pathlib.Path(__file__).parent
DEFAULT = "build/peers"
LR, KL_COEF = 1e-6, 0.01


def python_of(peer: str, folder: str) -> pathlib.Path:
    """The interpreter of a peer's environment in `folder`, made from `PEER.txt` when it is not there.

    Raises UserError when its packages cannot be installed.
    """
    home = pathlib.Path(folder).expanduser().absolute() / peer
    python, wanted, stamp = home / "bin" / "python", HERE / f"{peer}.txt", home / "installed.txt"
    if stamp.is_file() and stamp.read_text() == wanted.read_text():
        return python
    print(f"installing {peer} into {home}, once", file=sys.stderr)
    venv.create(home, with_pip=True)
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-r",
        str(wanted),
    ]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError(f"--peers={folder}: pip could not install {wanted}; see its message, or use --peers=")
    stamp.write_text(wanted.read_text())
    return python


def make_tokenizer(vocab: int) -> transformers.PreTrainedTokenizerFast:
    """` a12` begins a word of the text and `b13` goes on with it, so answers differ in their words."""
    special = {"<unk>": 0, "<pad>": 1, "<eos>": 2, "<spare>": 3}
    words = {(f"b{i}" if i % 2 else f" a{i}"): i for i in range(len(special), vocab)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({**special, **words}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r" a\d+|b\d+"), "isolated")
    made.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


def make_spec(flags: argparse.Namespace, size: Workload) -> dict[str, Any]:
    """What a peer's script reads: weights, tokenizer, prompts as texts, sizes, settings."""
    folder, vocab = common.weights_folder(flags.shape, flags.dtype), common.SHAPES[flags.shape]["vocab_size"]
    tokenizer = make_tokenizer(vocab)
    # Beside the weights it would be read as the architecture's own kind of tokenizer.
    tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "folder": str(folder),
        "tokenizer": str(folder / "tokenizer"),
        "prompts": tokenizer.batch_decode(common.random_tokens((size.prompts, size.slots), vocab)),
        "group": size.group,
        "slots": size.slots,
        "new": size.new,
        "parts": size.parts,
        "threads": common.CORES,
        "lr": LR,
        "kl_coef": KL_COEF,
    }


def open_peer(peer: str, script: str, flags: argparse.Namespace, size: Workload) -> Peer:
    """The process of a script, its environment made first where it is missing."""
    return Peer(script, python_of(peer, flags.peers), make_spec(flags, size))


@contextlib.contextmanager
def torch_peer(
    script: str, flags: argparse.Namespace, tokens: Mapping[str, np.ndarray], **spec: Any
) -> Iterator[Peer]:
    """The process of a PyTorch script in this environment, with its arrays and settings."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "tokens.npz"
        np.savez(path, allow_pickle=False, **tokens)
        about = {
            "folder": str(common.weights_folder(flags.shape, flags.dtype)),
            "tokens": str(path),
            "dtype": flags.dtype,
            "device": "cuda" if flags.device == "gpu" else "cpu",
            "threads": common.CORES,
        }
        peer = Peer(script, pathlib.Path(sys.executable), {**about, **spec})
        try:
            yield peer
        finally:
            peer.close()


def full_round(process: Peer, size: Workload) -> None:
    """One round of a peer that wrote what it should."""
    check_written(process()["tokens"], size)


def check_written(tokens: float, size: Workload) -> None:
    """RuntimeError when a contender wrote clearly fewer tokens in a round than the others do."""
    if tokens < 0.9 * size.rows * size.new:
        raise RuntimeError(f"{tokens} tokens were written in a round, not {size.rows * size.new}")


class Peer:
    """A script of this folder in its environment. Calling it runs one round there and waits for its end."""

    def __init__(self, script: str, python: pathlib.Path, spec: dict[str, Any]) -> None:
        self._name, self._folder = script, tempfile.TemporaryDirectory()
        path = pathlib.Path(self._folder.name) / "spec.json"
        path.write_text(json.dumps(spec))
        self._process = subprocess.Popen(
            [str(python), str(HERE / script), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self._folder.name,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )

    def __call__(self) -> dict[str, Any]:
        """What the script says about the round; RuntimeError when its process ended instead."""
        assert self._process.stdin is not None and self._process.stdout is not None  # pipes
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(
                f"{self._name} ended with status {self._process.wait()}; see its messages above"
            )
        return json.loads(answer)

    def peak_bytes(self) -> int:
        """The most memory that it held so far."""
        return common.peak_bytes(self._process.pid)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._folder.cleanup()
