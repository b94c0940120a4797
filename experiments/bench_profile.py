"""Where the time of a compiled program goes: into its matrix products, or around them; one JSON line a case.

    taskset -c 0 python -m experiments.bench_profile [--case=NAME]

    train     a supervised step on W with shared prompts
    rows      the same with separate rows
    decode    W's generation in one program

On one core, because there the times of instructions add up to that of the program. products: seconds in
instructions that hold a matrix product, from the profiler's trace of one run; rest: in all others, of
which `most` names the kinds that take the most time; limit: seconds of the products that cannot be
avoided at the measured matmul peak (decoding: see bench_rollout).
"""

from __future__ import annotations

import argparse
import collections
import functools
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.stages import Lowered

from experiments import bench_common as common
from experiments import bench_limits as limits
from experiments import bench_rollout, bench_train
from experiments.bench_common import Line
from gtalign_jax.errors import exit_on_user_error
from gtalign_jax.learning.sft import sft_update
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, spread
from gtalign_jax.planning import hlo
from gtalign_jax.rollout import programs

OUTER = ("while", "call", "conditional")  # their time is that of what they run
MOST = 8


def products(module: hlo.Module) -> set[str]:
    """The instructions that are, or hold, a matrix product."""

    def is_product(line: hlo.Instruction) -> bool:
        return line.opcode == "dot" or "matmul" in line.attributes.lower()

    holding = {name for name, lines in module.computations.items() if any(map(is_product, lines.values()))}

    def holds(line: hlo.Instruction) -> bool:
        called = {name for _, name in hlo.CALLED.findall(line.attributes)}
        return is_product(line) or (line.opcode == "fusion" and bool(called & holding))

    return {line.name for lines in module.computations.values() for line in lines.values() if holds(line)}


def seconds_by_instruction(module: hlo.Module, run: Callable[[], object]) -> dict[str, float]:
    """Seconds of every instruction of the module in one traced run."""
    inner = {
        line.name
        for lines in module.computations.values()
        for line in lines.values()
        if line.opcode not in OUTER
    }
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(trace))
        taken: dict[str, float] = collections.defaultdict(float)
        for plane in data.planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name in inner:
                        taken[event.name] += event.duration_ns / 1e9
    return dict(taken)


def profile(text: str, run: Callable[[], object]) -> Line:
    """What a program (`text_of`) that `run` runs once spends on products and on the rest."""
    module = hlo.parse(text)
    (whole,) = common.time_rounds(1, {"ours": lambda: run})["ours"]
    taken, named = seconds_by_instruction(module, run), products(module)
    inside = sum(seconds for name, seconds in taken.items() if name in named)
    rest = {name: seconds for name, seconds in taken.items() if name not in named}
    return {
        "unit": "s",
        "ours": round(whole, 3),
        "products": round(inside, 3),
        "rest": round(sum(rest.values()), 3),
        "most": by_kind(rest),
    }


def text_of(program: Lowered) -> str:
    """The program as it is compiled, in HLO."""
    text = program.compile().as_text()
    assert text is not None  # all of XLA's have one
    return text


def by_kind(taken: Mapping[str, float]) -> dict[str, float]:
    """Seconds of the instructions of one kind, their names without the number, the longest first."""
    kinds: dict[str, float] = collections.defaultdict(float)
    for name, seconds in taken.items():
        kinds[re.sub(r"[.\d]+$", "", name)] += seconds
    longest = sorted(kinds.items(), key=lambda pair: pair[1], reverse=True)[:MOST]
    return {kind: round(seconds, 3) for kind, seconds in longest}


def train(flags: argparse.Namespace, *, shared: bool) -> list[Line]:
    config, params = common.our_model(flags)
    size = common.workload("W", flags.shape)
    tokens = bench_train.make_tokens(size, config.vocab_size)
    setup, mesh = bench_train.sft_setup(config), make_mesh(MeshConfig())
    made = bench_train.make_batch(tokens if shared else tokens.separate(), policy=False)
    batch = spread(jax.device_put(made), mesh)
    held = {"state": spread(bench_train.start_state(params, setup.optimizer), mesh)}
    text = text_of(sft_update.lower(setup, held["state"], batch))

    def run() -> None:
        held["state"], _ = sft_update(setup, held["state"], batch)
        jax.block_until_ready(held["state"])

    flops = limits.step_flops(common.SHAPES[flags.shape], size, shared=shared)
    line = profile(text, run)
    return [{"case": "train" if shared else "rows", **line, "limit": round(flops / common.machine()[0], 3)}]


def decode(flags: argparse.Namespace) -> list[Line]:
    config, params = common.our_model(flags)
    size = common.workload("W", flags.shape)
    args = bench_rollout.generate_args(config, params, size)
    text = text_of(programs.generate.lower(*args, until=np.int32(size.new)))
    line = profile(text, lambda: bench_rollout.generate(config, params, size))
    least = size.new * limits.decode_seconds(common.SHAPES[flags.shape], size.rows, flags.dtype)
    return [{"case": "decode", **line, "limit": round(least, 3)}]


def cases(flags: argparse.Namespace) -> dict[str, Sequence[Callable[[], list[Line]]]]:
    return {
        "train": [functools.partial(train, flags, shared=True)],
        "rows": [functools.partial(train, flags, shared=False)],
        "decode": [functools.partial(decode, flags)],
    }


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    common.add_flags(parser)
    argv = sys.argv[1:] if argv is None else argv
    flags = parser.parse_args(argv)
    common.restart_tuned("experiments.bench_profile", argv, flags)
    common.run_cases("profile", flags, cases(flags))


if __name__ == "__main__":
    main()
