"""A whole GRPO step: rollout, reward, reference logprobs, update; one JSON line a case and peer.

    python -m experiments.bench_step [--case=NAME] [--repeats=3] [--only=trl,tunix] [--peers=build/peers]

    W         4 prompts x 8 samples, 64 prompt tokens, 128 new ones
    R         the same with 512 prompt tokens
    smollm2   the shape of SmolLM2 with 320 prompt tokens, each update's gradients in four parts, against TRL,
              one after the other for their memory; only when it is named

Ours is `align.align_step`, what `experiments.train` runs, judge, chain parsing and metrics included. The
peers are TRL's GRPOTrainer and Tunix's GRPOLearner, each in an environment of its own that is made on
first use (`--peers=` empty: ours alone). All have the same weights and prompts, one update a rollout, AdamW,
a KL to the reference in the loss, temperature 1, and a reward that counts words on the host; answers
end with the budget. Rounds alternate. Fields: ours, peer in completion tokens a second; seconds of
every step; limit: a step that only decodes at the weights' rate and multiplies at the matmul peak.
peak_mib: the most memory that each process held. Then the seconds of our step's parts, each with its limit:
rollout, scoring (reference logprobs and advantages), update, and host, the rest of the step; medians of all
steps but those that warm up.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax

from configs import base
from experiments import bench_common as common
from experiments import bench_limits as limits
from experiments.bench_common import Contender, Line, Workload
from experiments.peers import launch
from gtalign_jax.align import align_step
from gtalign_jax.data.item import Item
from gtalign_jax.data.loader import PromptSet
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.learning.gradients import Metrics
from gtalign_jax.learning.learner import Learner
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, spread
from gtalign_jax.remote.counters import Counters
from gtalign_jax.rewards.judges.rules import judge_by_rules
from gtalign_jax.rewards.mutual_welfare import RewardConfig
from gtalign_jax.rewards.tasks import TASKS
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.generator import make_generator
from gtalign_jax.run import feeds
from gtalign_jax.run.job import Job
from gtalign_jax.run.phase import to_numbers
from gtalign_jax.run.settings import Settings, make_settings
from gtalign_jax.run.states import align_state, make_learner
from gtalign_jax.types import Experience, Features, PyTree, Reward, TrainState

Seconds = dict[str, list[float]]
PEERS = {"trl": "trl_grpo.py", "tunix": "tunix_grpo.py"}
TARGETS: dict[tuple[str, str | None], float] = {
    ("W", "trl"): 2.5,
    ("W", "tunix"): 2.0,
    ("R", "trl"): 4.0,
    ("smollm2", "trl"): 2.5,
}
NEVER = -1  # no token ends an answer


def word_reward(features: Features, config: RewardConfig) -> Reward:
    """The number of words modulo 8, scaled to [0, 1]: cheap, and different within a group."""
    value = (features.total_words % 8) / 7
    return Reward(user=value, llm=value, welfare=value, parts={})


def make_settings_of(size: Workload) -> Settings:
    """GRPO as the presets have it, at the sizes of a workload."""
    config = base.get_config()
    config.max_new_tokens = size.new
    config.buckets.prompt, config.buckets.completion = (size.slots,), (size.new,)
    config.align.update(algorithm="grpo", steps=10**6, prompts=size.prompts, group_size=size.group)
    config.align.dump_every = 10**6
    config.algorithm.update(kl_coef=launch.KL_COEF, microbatches=size.parts)
    config.policy_optimizer.lr = launch.LR
    return make_settings(config)


def make_job(flags: argparse.Namespace, size: Workload, workdir: pathlib.Path) -> tuple[Job, PyTree]:
    """(a job whose prompts are the workload's, the starting parameters)."""
    model, params = common.our_model(flags)
    settings = make_settings_of(size)
    mesh = make_mesh(MeshConfig())
    tokens = common.random_tokens((size.prompts, size.slots), model.vocab_size).tolist()
    message = ({"role": "user", "content": "prompt"},)
    items = [Item(i, message, "medium", "medium", "", "prompt") for i in range(size.prompts)]
    tokenizer = launch.make_tokenizer(model.vocab_size)
    engine = Engine(tokenizer, model, (NEVER,), settings.sampling, settings.buckets, mesh)
    train = PromptSet(items, tokens)
    job = Job(
        settings=settings,
        workdir=workdir,
        model_folder=common.weights_folder(flags.shape, flags.dtype),
        engine=engine,
        generator=make_generator(settings.engine, engine, workdir),
        train=train,
        test=PromptSet([], []),
        demonstrations=[],
        feeds=feeds.in_memory(settings, TASKS, engine, train, []),
        tasks=TASKS,
        judge=judge_by_rules,
        consistency=None,
        judge_stats=Counters(),
        reward_fn=word_reward,
        untrained=(),
        response=(),
    )
    return job, spread(params, mesh)


@dataclasses.dataclass(frozen=True)
class ClockedLearner(Learner):
    """The trainer's learner; seconds of its two stages are added to `seconds`."""

    seconds: Seconds = dataclasses.field(default_factory=dict, compare=False)

    def experience(self, *args: Any) -> Experience:
        return clocked(self.seconds["scoring"], super().experience)(*args)

    def update(self, *args: Any) -> tuple[TrainState, Metrics]:
        return clocked(self.seconds["update"], super().update)(*args)


@contextlib.contextmanager
def our_step(flags: argparse.Namespace, size: Workload, parts: Seconds) -> Iterator[Contender]:
    """One step of the aligning phase a call, as `align.run_align` sets it up. parts: gets their seconds."""
    with tempfile.TemporaryDirectory() as folder:
        job, reference = make_job(flags, size, pathlib.Path(folder))
        plain = make_learner(job.settings, job.model, None)
        learner = ClockedLearner(plain.spec, plain.optimizers, parts)
        rollout = clocked(parts["rollout"], job.generator.rollout)
        job = dataclasses.replace(job, generator=dataclasses.replace(job.generator, rollout=rollout))
        state = spread(align_state(job.settings, learner, reference), job.mesh)
        held = {"state": state, "k": 0}

        def run() -> None:
            held["k"] += 1
            state, metrics = align_step(job, learner, reference, None, held["state"], held["k"])
            held["state"] = jax.block_until_ready(state)
            launch.check_written(to_numbers(metrics)["tokens"], size)

        with jax.set_mesh(job.mesh):
            yield clocked(parts["step"], run)


def clocked(taken: list[float], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which adds the seconds until its results are there to `taken`."""

    def call(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        made = jax.block_until_ready(function(*args, **options))
        taken.append(time.perf_counter() - start)
        return made

    return call


Opened = Callable[[], contextlib.AbstractContextManager[tuple[Contender, Callable[[], int]]]]
"""Opens a contender, beside which stands how many bytes its process held at most."""


@contextlib.contextmanager
def our_contender(
    flags: argparse.Namespace, size: Workload, parts: Seconds
) -> Iterator[tuple[Contender, Callable[[], int]]]:
    with our_step(flags, size, parts) as run:
        yield run, common.peak_bytes


@contextlib.contextmanager
def peer_contender(
    peer: str, flags: argparse.Namespace, size: Workload
) -> Iterator[tuple[Contender, Callable[[], int]]]:
    process = launch.open_peer(peer, PEERS[peer], flags, size)
    try:
        yield functools.partial(launch.full_round, process, size), process.peak_bytes
    finally:
        process.close()


def measure(name: str, flags: argparse.Namespace, wanted: list[str]) -> list[Line]:
    """One line a peer, or one without a peer when none is wanted; then one for each part of our step."""
    if name == "smollm2":
        flags, size = common.real_shape(flags, slots=320, parts=4)
    else:
        size = common.workload(name, flags.shape)
    parts: Seconds = defaultdict(list)
    contenders: dict[str, Opened] = {"ours": functools.partial(our_contender, flags, size, parts)}
    contenders |= {peer: functools.partial(peer_contender, peer, flags, size) for peer in wanted}
    groups = [[one] for one in contenders] if name == "smollm2" else [list(contenders)]
    seconds: Seconds = {}
    held: dict[str, int] = {}
    for group in groups:  # rounds alternate, but for those that do not fit into memory together
        with contextlib.ExitStack() as stack:
            opened = {who: stack.enter_context(contenders[who]()) for who in group}
            makes = {who: (lambda run=run: run) for who, (run, _) in opened.items()}
            # A round of minutes hardly feels fresh pages.
            spare = 0 if name == "smollm2" else common.SPARE
            seconds |= common.time_rounds(flags.repeats, makes, spare=spare)
            held |= {who: round(peak() / 2**20) for who, (_, peak) in opened.items()}
        common.release()
    tokens = size.rows * size.new
    least = least_seconds(flags, size)
    most = round(tokens / sum(least.values()), 1)
    lines = []
    beside: list[str | None] = [*wanted] or [None]
    for other in beside:
        line: Line = {"case": name, "unit": "completion tokens/s", "peer_name": other, "shape": flags.shape}
        line["peak_mib"] = {who: held[who] for who in ("ours", other) if who}
        line |= common.compare(seconds["ours"], None if other is None else seconds[other], tokens)
        lines.append({**line, "limit": most, "target": TARGETS.get((name, other))})
    about = {"case": name, "unit": "s", "shape": flags.shape}
    return lines + [{**about, **line} for line in part_lines(parts, least)]


def part_lines(parts: Seconds, least: dict[str, float]) -> list[Line]:
    """Median seconds of each part of the steps after those that warm up, and of the rest, on the host."""
    counted = {name: taken[common.WARM_UP :] for name, taken in parts.items()}
    whole = counted.pop("step")
    inside = [sum(of_step) for of_step in zip(*counted.values(), strict=True)]
    counted["host"] = [a - b for a, b in zip(whole, inside, strict=True)]
    lines = []
    for name in ("rollout", "scoring", "update", "host"):
        line: Line = {"variant": name, "ours": round(statistics.median(counted[name]), 3)}
        if name in least:
            line |= {"limit": round(least[name], 3), "share": round(least[name] / line["ours"], 3)}
        lines.append(line | {"seconds": {"ours": [round(s, 3) for s in counted[name]]}})
    return lines


def least_seconds(flags: argparse.Namespace, size: Workload) -> dict[str, float]:
    """Decoding at the weights' rate, then a scoring and an update, prompts shared, at the matmul peak."""
    fields = common.SHAPES[flags.shape]
    update = limits.step_flops(fields, size, shared=True) / common.machine(flags.dtype)[0]
    decode = size.new * limits.decode_seconds(fields, size.rows, flags.dtype)
    return {"rollout": decode, "scoring": update / 3, "update": update}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    common.add_flags(parser)
    parser.add_argument("--peers", default=launch.DEFAULT, help="folder of their environments; empty: none")
    parser.add_argument("--only", default=",".join(PEERS), help="peers to run, by comma")
    argv = sys.argv[1:] if argv is None else argv
    flags = parser.parse_args(argv)
    common.restart_tuned("experiments.bench_step", argv, flags)
    if (flags.device, flags.dtype) != ("cpu", "float32"):
        given = f"--device={flags.device} --dtype={flags.dtype}"
        raise UserError(f"{given}: the peers of a step run in float32 on a CPU; leave the defaults")
    wanted = [peer for peer in flags.only.split(",") if peer] if flags.peers else []
    for peer in wanted:
        if peer not in PEERS:
            raise UserError(f"--only={flags.only}: {peer!r} is not one of {', '.join(PEERS)}")
    beside = {"W": wanted, "R": wanted, "smollm2": [peer for peer in wanted if peer == "trl"]}
    cases = {name: [functools.partial(measure, name, flags, peers)] for name, peers in beside.items()}
    common.run_cases("step", flags, cases, named_only=("smollm2",))


if __name__ == "__main__":
    main()
