"""What the benchmarks share: workloads, random weights for everybody, clocks, the machine's limits.

Contenders of a case are measured in one run: on a CPU all are made first and their rounds alternate, so
that a change of the machine's mood hits them alike; on a GPU one at a time, because memory is short.
Every process, ours and the peers', runs with the same allocator settings (`ALLOCATOR`) and the same cores.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import torch
import transformers

from gtalign_jax.errors import UserError
from gtalign_jax.models import hf
from gtalign_jax.models.config import ModelConfig, RuntimeConfig, read_config
from gtalign_jax.types import PyTree

Line = dict[str, Any]
Contender = Callable[[], Any]  # runs one round
Make = Callable[[], Contender]


@dataclasses.dataclass(frozen=True)
class Workload:
    """P prompts of S tokens, G completions of N tokens each; `rows` are the P*G sequences they make.

    parts: that the gradients of an update are summed over.
    """

    prompts: int = 4
    group: int = 8
    slots: int = 64
    new: int = 128
    parts: int = 1

    @property
    def rows(self) -> int:
        return self.prompts * self.group


_TIED = {"tie_word_embeddings": True, "eos_token_id": None, "bos_token_id": None}
_KINDS = {"smollm2": "llama"}  # the others are Qwen2
# hidden, intermediate, layers, heads, kv heads, vocabulary, positions
_SIZES = {
    "small": (512, 1536, 8, 8, 2, 16384, 4096),
    "tiny": (32, 64, 1, 2, 1, 512, 256),
    "qwen2_5_0_5b": (896, 4864, 24, 14, 2, 151936, 32768),
    "qwen2_5_3b": (2048, 11008, 36, 16, 2, 151936, 32768),
    "smollm2": (576, 1536, 30, 9, 3, 49152, 8192),
}
_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
SHAPES: dict[str, dict[str, Any]] = {
    name: {"model_type": _KINDS.get(name, "qwen2"), **_TIED, **dict(zip(_FIELDS, size, strict=True))}
    for name, size in _SIZES.items()
}


def workload(name: str, shape: str) -> Workload:
    """W, or R with the prompts of real use; the tiny shape has a tiny workload."""
    if shape == "tiny":
        return Workload(prompts=2, group=2, slots={"W": 8, "R": 24}[name], new=8)
    return Workload(slots={"W": 64, "R": 512}[name])


def real_shape(flags: argparse.Namespace, **size: int) -> tuple[argparse.Namespace, Workload]:
    """(the flags with the shape of SmolLM2, W with sizes of its own); tiny stays tiny."""
    if flags.shape == "tiny":
        return flags, workload("W", "tiny")
    return argparse.Namespace(**{**vars(flags), "shape": "smollm2"}), Workload(**size)


def peak_bytes(pid: int | str = "self") -> int:
    """The most memory that a process held so far (Linux)."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def random_tokens(shape: Sequence[int], vocab: int, seed: int = 0) -> np.ndarray:
    """int32 tokens; the first four ids are left to special tokens."""
    return np.random.default_rng(seed).integers(4, vocab, shape).astype(np.int32)


# --- weights ------------------------------------------------------------------------------------------


def scratch_folder(prefix: str) -> pathlib.Path:
    """A new folder, removed when the process ends."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def weights_folder(shape: str, dtype: str) -> pathlib.Path:
    """An HF folder with random weights, which every contender reads."""
    folder = scratch_folder("bench-weights-")
    torch.manual_seed(0)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        config = transformers.AutoConfig.for_model(**SHAPES[shape])
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(kept)
    return folder


def our_config(flags: argparse.Namespace, remat: str = "none") -> ModelConfig:
    """Our configuration of the weights; layers are unrolled on a CPU."""
    runtime = RuntimeConfig(
        compute_dtype=flags.dtype, param_dtype=flags.dtype, remat=remat, scan_layers=flags.device != "cpu"
    )
    return read_config(weights_folder(flags.shape, flags.dtype), runtime)


def our_model(flags: argparse.Namespace, remat: str = "none") -> tuple[ModelConfig, PyTree]:
    """Our configuration and parameters."""
    config = our_config(flags, remat)
    return config, hf.load_params(weights_folder(flags.shape, flags.dtype), config)


# --- time ---------------------------------------------------------------------------------------------


WARM_UP = 2  # rounds that are never counted: the first compiles
SPARE = 6  # rounds more than these and the asked for, at most, to make up for those that asked for memory
STEADY = 1.01  # a round asked for none, when it left the processes at most so much larger


def time_rounds(
    repeats: int,
    makes: Mapping[str, Make],
    *,
    together: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    spare: int = SPARE,
) -> dict[str, list[float]]:
    """Seconds of each contender's rounds.

    The first WARM_UP are not counted, nor is one in which a contender's process grew: fresh pages cost it
    up to a few seconds, at one round or another. spare: rounds more, at most, to make up for those.
    together: all are made first and their rounds alternate; otherwise one after the other, each dropped
    before the next is made.
    """
    if together:
        return steady_rounds(repeats, {name: make() for name, make in makes.items()}, clock, spare)
    seconds: dict[str, list[float]] = {}
    for name, make in makes.items():
        seconds |= steady_rounds(repeats, {name: make()}, clock, spare)
        release()
    return seconds


def steady_rounds(
    repeats: int, runs: Mapping[str, Contender], clock: Callable[[], float], spare: int = SPARE
) -> dict[str, list[float]]:
    """Seconds of the rounds that count; of others too, where too few do."""
    steady: list[dict[str, float]] = []
    grown: list[dict[str, float]] = []
    for number in range(WARM_UP + repeats + spare):
        held = resident_bytes()
        seconds = {name: seconds_of(run, clock) for name, run in runs.items()}
        if number >= WARM_UP:
            (steady if resident_bytes() < STEADY * held else grown).append(seconds)
        if len(steady) == repeats:
            break
    return {name: [seconds[name] for seconds in (steady + grown)[:repeats]] for name in runs}


def seconds_of(run: Contender, clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def resident_bytes() -> int:
    """Memory that this process and those it started hold."""
    me = psutil.Process()
    return sum(process.memory_info().rss for process in (me, *me.children(recursive=True)))


def release() -> None:
    """Drop compiled programs and give freed memory, which `ALLOCATOR` keeps, back to the system."""
    gc.collect()
    jax.clear_caches()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def compare(ours: Sequence[float], peer: Sequence[float] | None, tokens: int, digits: int = 1) -> Line:
    """Tokens a second of ours and of the peer (medians), their ratio, and the seconds of every round."""
    line: Line = {"ours": round(tokens / statistics.median(ours), digits)}
    seconds = {"ours": [round(s, 3) for s in ours]}
    if peer is not None:
        line["peer"] = round(tokens / statistics.median(peer), digits)
        line["ratio"] = round(statistics.median(peer) / statistics.median(ours), 2)
        seconds["peer"] = [round(s, 3) for s in peer]
    return {**line, "seconds": seconds}


def lower_is_better(ours: Sequence[float], peer: Sequence[float]) -> Line:
    """Median seconds of both and ours over the peer's."""
    mine, other = statistics.median(ours), statistics.median(peer)
    seconds = {"ours": [round(s, 3) for s in ours], "peer": [round(s, 3) for s in peer]}
    return {
        "ours": round(mine, 3),
        "peer": round(other, 3),
        "ratio": round(mine / other, 3),
        "seconds": seconds,
    }


# --- the machine --------------------------------------------------------------------------------------


@functools.cache
def machine(dtype: str = "float32") -> tuple[float, float]:
    """(matmul rate in FLOP/s, memory read rate in bytes/s), the best of five."""
    on_cpu = jax.default_backend() == "cpu"
    a = jnp.ones((1536, 1536) if on_cpu else (8192, 8192), dtype)
    big = jnp.ones(2**26 if on_cpu else 2**30, jnp.float32)
    best = {}
    for name, function, args in (("multiply", jnp.matmul, (a, a)), ("read", jnp.sum, (big,))):
        run = jax.jit(function)
        jax.block_until_ready(run(*args))
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            taken.append(time.perf_counter() - start)
        best[name] = min(taken)
    return 2 * a.size * a.shape[0] / best["multiply"], big.nbytes / best["read"]


# --- flags and output ---------------------------------------------------------------------------------

# glibc keeps freed memory and uses huge pages: page faults cost everybody 10 to 30 % otherwise. One arena,
# because what a thread's own arena cannot hold is given back at every free, whatever the thresholds say.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**34),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
CORES = len(os.sched_getaffinity(0))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every benchmark."""
    parser.add_argument("--case", default="", help="one case; all of them without it")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds, after those that warm up")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--shape", default="small", choices=tuple(SHAPES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--allocator", default="tuned", choices=("tuned", "default"))


def check_flags(flags: argparse.Namespace, cases: Sequence[str]) -> None:
    """UserError where a flag asks for what is not here."""
    if flags.repeats < 1:
        raise UserError(f"--repeats={flags.repeats}: must be at least 1")
    if flags.case and flags.case not in cases:
        raise UserError(f"--case={flags.case}: must be one of {', '.join(cases)}")
    if flags.device == "gpu" and not (torch.cuda.is_available() and jax.default_backend() == "gpu"):
        raise UserError("--device=gpu: needs a GPU that both jax and torch see; use --device=cpu")
    if flags.device == "cpu" and jax.default_backend() != "cpu":
        raise UserError("--device=cpu: jax has another default; set JAX_PLATFORMS=cpu")


def restart_tuned(module: str, argv: Sequence[str], flags: argparse.Namespace) -> None:
    """Begin again in the environment that all contenders share; a process reads it when it starts.

    A test that calls `main` sets `BENCH_STARTED` and stays in its process.
    """
    if "BENCH_STARTED" in os.environ:
        return
    shared = {"BENCH_STARTED": "1", "OMP_NUM_THREADS": str(CORES), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if flags.device == "cpu":
        shared["JAX_PLATFORMS"] = "cpu"
    if flags.allocator == "tuned":
        shared |= ALLOCATOR
    os.execve(sys.executable, [sys.executable, "-m", module, *argv], {**os.environ, **shared})


def emit(bench: str, flags: argparse.Namespace, line: Line) -> None:
    """Print one JSON line with what it was measured under, as the flags have it where it does not say."""
    about = {"shape": flags.shape, "dtype": flags.dtype, "device": jax.devices()[0].device_kind}
    print(json.dumps({"bench": bench, **line, **about, **line, "allocator": flags.allocator}), flush=True)


Cases = Mapping[str, Sequence[Callable[[], list[Line]]]]


def run_cases(bench: str, flags: argparse.Namespace, cases: Cases, *, named_only: Sequence[str] = ()) -> None:
    """Check the flags, then print the lines of the case that was asked for, or of all but `named_only`.

    Of several measurements each has a process of its own, so that none finds what another left in memory.
    """
    check_flags(flags, tuple(cases))
    names = [flags.case] if flags.case else [name for name in cases if name not in named_only]
    measures = [measure for name in names for measure in cases[name]]
    for measure in measures:
        for line in measure() if len(measures) == 1 else in_own_process(measure):
            emit(bench, flags, line)


def in_own_process(measure: Callable[[], list[Line]]) -> list[Line]:
    """What a function that can be pickled returns in a new interpreter."""
    with futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure).result()
