"""Generation speed; one JSON line a case and peer.

    python -m experiments.bench_rollout [--case=NAME] [--repeats=3] [--peers=build/peers] [--vllm=.venv-vllm]

    W         4 prompts x 8 samples, 64 prompt tokens, 128 new ones, against transformers `generate` and
              Tunix's sampler, which has an environment of its own (`--peers=` empty: without it)
    R         the same with 512 prompt tokens
    ragged    31 answers of 32 tokens and one of 128, against what as many tokens cost in W: one such set,
              which ends with a lone long answer, and 4 and 16 sets that wait in a queue for 32 places
    grammar   W held to the chain's grammar, against W without
    growth    W at once, twice and four times the batch, the length and the depth
    batch64   W with 8 prompts, against transformers: what is asked of a GPU; only when it is named
    smollm2   the shape of SmolLM2, 270 prompt tokens, against vLLM where `make vllm` made its environment,
              a thread on every core, the samples' prompts computed once; only when it is named

Fields: ours and peer in new tokens a second (medians), their ratio, seconds of every round, and limit:
what the machine allows, each step reading every weight once and multiplying it with all rows at the rates
measured in the same run. `ragged` gives seconds and `grammar` CPU seconds, which other load on the machine
does not change, with the ratio to stay below as target. All contenders have the same weights and prompts,
sample at temperature 1 and never end early; their rounds alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures

import jax
import numpy as np
import openai

from experiments import bench_common as common
from experiments import bench_limits as limits
from experiments.bench_common import Contender, Line, Make, Workload
from experiments.peers import launch, servers
from gtalign_jax.chain.grammar import chain_grammar
from gtalign_jax.data.tokenizer import protocol_strings
from gtalign_jax.errors import exit_on_user_error
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.transformer import init_params
from gtalign_jax.rollout import programs
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.generate import rollout
from gtalign_jax.rollout.grammar import Constraint, compile_constraint
from gtalign_jax.rollout.request import Ending, Placed, Request, Rules
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.types import PromptBatch, PyTree, Rollout

SAMPLING = SamplingConfig()
PREFIXES = "--enable-prefix-caching"  # of the samples of a prompt
NEVER = Ending(np.array([-1], np.int32))
TARGETS = {("W", "transformers"): 2.5, ("W", "tunix"): 2.0, ("smollm2", "vLLM"): 1.5}


def make_batch(size: Workload, vocab: int) -> PromptBatch:
    """Full prompts of random tokens, the same that the peers get."""
    tokens = common.random_tokens((size.prompts, size.slots), vocab)
    return PromptBatch(tokens, np.full(size.prompts, size.slots, np.int32))


def generate(
    config: ModelConfig, params: PyTree, size: Workload, constraint: Constraint | None = None
) -> Rollout:
    """Ours, as the engine runs it in one program."""
    args = generate_args(config, params, size, constraint)
    return jax.block_until_ready(programs.generate(*args, until=np.int32(size.new)))


def generate_args(
    config: ModelConfig, params: PyTree, size: Workload, constraint: Constraint | None = None
) -> tuple[PyTree, ModelConfig, Placed, SamplingConfig, Rules]:
    """What `programs.generate` is given for a workload, besides until = size.new."""
    row = np.arange(size.prompts, dtype=np.int32)
    batch = make_batch(size, config.vocab_size)
    placed = Placed(batch, jax.random.key(0), size.group, size.new, row)
    return params, config, placed, SAMPLING, Rules(NEVER, constraint)


def made(run: Contender) -> Make:
    """A contender that needs no more making."""
    return lambda: run


# --- cases --------------------------------------------------------------------------------------------


def against_peers(name: str, flags: argparse.Namespace) -> list[Line]:
    fields, size = common.SHAPES[flags.shape], common.workload("R" if name == "R" else "W", flags.shape)
    if name == "batch64":
        size = dataclasses.replace(size, prompts=64 // size.group)

    with contextlib.ExitStack() as stack:

        def peer() -> Contender:
            prompts = {"prompt": make_batch(size, fields["vocab_size"]).tokens}
            opened = launch.torch_peer("torch_generate.py", flags, prompts, group=size.group, new=size.new)
            return functools.partial(launch.full_round, stack.enter_context(opened), size)

        makes: dict[str, Make] = {"ours": functools.partial(ours, flags, size), "transformers": peer}
        on_cpu = flags.device == "cpu" and flags.dtype == "float32"  # what its script is written for
        if flags.peers and on_cpu and name != "batch64":
            process = launch.open_peer("tunix", "tunix_sampler.py", flags, size)
            stack.callback(process.close)
            makes["tunix"] = made(functools.partial(launch.full_round, process, size))
        seconds = common.time_rounds(flags.repeats, makes, together=flags.device == "cpu")
    return rate_lines(name, flags, size, seconds)


def ours(flags: argparse.Namespace, size: Workload) -> Contender:
    config, params = common.our_model(flags)
    return lambda: generate(config, params, size)


def rate_lines(
    name: str, flags: argparse.Namespace, size: Workload, seconds: Mapping[str, Sequence[float]]
) -> list[Line]:
    """A line a peer, or one of ours alone."""
    fields = common.SHAPES[flags.shape]
    limit = round(size.rows / limits.decode_seconds(fields, size.rows, flags.dtype), 1)
    lines = []
    peers: list[str | None] = [n for n in seconds if n != "ours"] or [None]
    for peer in peers:
        line: Line = {"case": name, "unit": "new tokens/s", "peer_name": peer, "shape": flags.shape}
        line |= common.compare(seconds["ours"], seconds[peer] if peer else None, size.rows * size.new)
        share = round(line["ours"] / limit, 3)
        lines.append({**line, "limit": limit, "share": share, "target": TARGETS.get((name, peer or ""))})
    return lines


def real_shape(flags: argparse.Namespace) -> list[Line]:
    """Case smollm2."""
    flags, size = common.real_shape(flags, slots=270)
    makes: dict[str, Make] = {"ours": functools.partial(ours, flags, size)}
    with contextlib.ExitStack() as stack:
        if python := servers.vllm_python(flags.vllm):
            spec = launch.make_spec(flags, size)
            tokenizer = f"--tokenizer={spec['tokenizer']}"
            server = servers.vllm(
                pathlib.Path(spec["folder"]), python, 2 * (size.slots + size.new), tokenizer, PREFIXES
            )
            makes["vLLM"] = made(functools.partial(vllm_round, stack.enter_context(server).port, flags, size))
        seconds = common.time_rounds(flags.repeats, makes)
    return rate_lines("smollm2", flags, size, seconds)


def vllm_round(port: int, flags: argparse.Namespace, size: Workload) -> None:
    """All prompts at once, each with its group of samples, in one answer each."""
    prompts = make_batch(size, common.SHAPES[flags.shape]["vocab_size"]).tokens.tolist()
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600.0, max_retries=0
    )
    asked = functools.partial(
        client.completions.create, model="bench", n=size.group, max_tokens=size.new, temperature=1.0
    )

    def ask(prompt: list[int]) -> int:
        usage = asked(prompt=prompt, extra_body={"ignore_eos": True}).usage
        assert usage is not None  # of an answer that is no stream
        return usage.completion_tokens

    with futures.ThreadPoolExecutor(size.prompts) as pool:
        launch.check_written(sum(pool.map(ask, prompts)), size)


def ragged(flags: argparse.Namespace) -> list[Line]:
    """Sets of one long answer and short ones for the rest of W: one set at once, and more in a queue."""
    config, params = common.our_model(flags)
    size = common.workload("W", flags.shape)
    plain = made(functools.partial(generate, config, params, size))
    lines = []
    for variant, sets in (("one batch", 1), ("queue of 4", 4), ("queue of 16", 16)):
        queue = dataclasses.replace(size, prompts=sets * size.prompts)
        run = ragged_run(config, params, queue, size.rows)
        length = np.ravel(run().completions.length)
        written = int(np.sum(length))
        seconds = common.time_rounds(flags.repeats, {"ours": made(run), "plain": plain})
        part = written / (size.rows * size.new)
        about = {"case": "ragged", "variant": variant, "unit": "s", "peer_name": "token-proportional time"}
        line = common.lower_is_better(seconds["ours"], [s * part for s in seconds["plain"]])
        if sets == 1:
            line["limit"] = round(least_seconds(length, statistics.median(seconds["plain"]), size, flags), 3)
        lines.append({**about, "tokens": written, **line, "target": 1.3})
    return lines


def least_seconds(length: np.ndarray, plain: float, size: Workload, flags: argparse.Namespace) -> float:
    """Of one set at once: a step costs its live rows' part of a step of W, or the reading of the weights."""
    live = np.sum(length[:, None] > np.arange(length.max()), axis=0)
    reading = limits.reading_seconds(common.SHAPES[flags.shape], flags.dtype)
    return float(np.sum(np.maximum(plain / size.new * live / size.rows, reading)))


def ragged_run(config: ModelConfig, params: PyTree, size: Workload, places: int) -> Callable[[], Rollout]:
    """A generation, `places` rows at a time, whose rows are short, but for one in each set of so many.

    Row 0 of a set never writes what ends the others: their tokens at a quarter of the length.
    """
    free = np.asarray(generate(config, params, size).completions.tokens).reshape(-1, size.new)
    long = np.arange(size.rows) % places == 0
    ends = np.setdiff1d(free[~long, size.new // 4 - 1], free[long]).astype(np.int32)
    ending = Ending(np.resize(ends, size.rows).astype(np.int32))
    buckets = BucketConfig(prompt=(size.slots,), completion=(size.new,))
    engine = Engine(None, config, (), SAMPLING, buckets, compact_every=8, rows=places)
    batch, key = make_batch(size, config.vocab_size), jax.random.key(0)
    request = Request(batch, key, size.group, size.new, ending=ending)
    return lambda: rollout(engine, params, request)


def grammar(flags: argparse.Namespace) -> list[Line]:
    """The vocabulary: bytes, the protocol's strings, and pieces of this folder's text."""
    config, params = common.our_model(flags)
    size = common.workload("W", flags.shape)
    start = time.perf_counter()
    tokens = vocabulary(config.vocab_size)
    constraint = compile_constraint(chain_grammar(), tokens, [config.vocab_size - 1], budget=size.new)
    compiled = time.perf_counter() - start
    constraint = jax.device_put(constraint)
    makes = {
        "held": made(functools.partial(generate, config, params, size, constraint)),
        "free": made(functools.partial(generate, config, params, size)),
    }
    seconds = common.time_rounds(flags.repeats, makes, clock=time.process_time)
    line = {"case": "grammar", "unit": "CPU s", "peer_name": "without grammar"}
    line |= common.lower_is_better(seconds["held"], seconds["free"])
    return [{**line, "target": 1.05, "compile_s": round(compiled, 2), "tables": list(constraint.step.shape)}]


def vocabulary(size: int) -> list[bytes | None]:
    """The bytes of `size` tokens, the last one the end token."""
    text = b"".join(path.read_bytes() for path in sorted(pathlib.Path(__file__).parent.glob("*.py")))
    known = dict.fromkeys([bytes([b]) for b in range(256)] + [s.encode() for s in protocol_strings()])
    rng = np.random.default_rng(0)
    while len(known) < size - 1:
        at, width = rng.integers(len(text)), rng.integers(2, 9)
        known.setdefault(text[at : at + width])
    return [*known, None]


def growth(name: str, factor: int, flags: argparse.Namespace) -> list[Line]:
    config = common.our_config(flags)
    fields, size = dict(common.SHAPES[flags.shape]), common.workload("W", flags.shape)
    if name == "depth":
        config = dataclasses.replace(config, num_layers=config.num_layers * factor, source="")
        fields["num_hidden_layers"] *= factor
    elif name == "batch":
        size = dataclasses.replace(size, prompts=size.prompts * factor)
    elif name == "length":
        size = dataclasses.replace(size, new=size.new * factor)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    makes = {"ours": made(functools.partial(generate, config, params, size))}
    seconds = common.time_rounds(flags.repeats, makes)["ours"]
    limit = round(size.rows / limits.decode_seconds(fields, size.rows, flags.dtype), 1)
    line: Line = {"case": "growth", "variant": f"{name} x{factor}", "unit": "new tokens/s"}
    line |= common.compare(seconds, None, size.rows * size.new)
    return [{**line, "limit": limit, "share": round(line["ours"] / limit, 3)}]


def cases(flags: argparse.Namespace) -> dict[str, Sequence[Callable[[], list[Line]]]]:
    """Name -> what to measure, in the order of the docstring."""
    sizes = [("batch", 1), *((name, factor) for name in ("batch", "length", "depth") for factor in (2, 4))]
    return {
        "W": [functools.partial(against_peers, "W", flags)],
        "R": [functools.partial(against_peers, "R", flags)],
        "ragged": [functools.partial(ragged, flags)],
        "grammar": [functools.partial(grammar, flags)],
        "growth": [functools.partial(growth, name, factor, flags) for name, factor in sizes],
        "batch64": [functools.partial(against_peers, "batch64", flags)],
        "smollm2": [functools.partial(real_shape, flags)],
    }


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    common.add_flags(parser)
    parser.add_argument("--peers", default=launch.DEFAULT, help="folder of Tunix's environment; empty: none")
    parser.add_argument("--vllm", default=servers.VLLM, help="vLLM's environment; empty: without")
    argv = sys.argv[1:] if argv is None else argv
    flags = parser.parse_args(argv)
    common.restart_tuned("experiments.bench_rollout", argv, flags)
    common.run_cases("rollout", flags, cases(flags), named_only=("batch64", "smollm2"))


if __name__ == "__main__":
    main()
