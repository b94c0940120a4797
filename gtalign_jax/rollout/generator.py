"""Who generates in a run, as `config.engine` says: our own engine, held to the grammar or not, or servers.

Training, evaluation and steering all ask here, so that one switch decides for all of them.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from gtalign_jax.errors import MAX_COUNT, in_range, naming
from gtalign_jax.files import paths
from gtalign_jax.mesh import processes
from gtalign_jax.mesh.memory import GENERATION, Purpose, compile_to_fit
from gtalign_jax.rollout import external, grammar, servers
from gtalign_jax.rollout import generate as generate_lib
from gtalign_jax.rollout.backends import check_sampling
from gtalign_jax.rollout.buckets import bucket
from gtalign_jax.rollout.engine import Engine, make_constraint, prompt_batch
from gtalign_jax.rollout.grammar import BlockLimits, Constraint
from gtalign_jax.rollout.programs import Compile
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.sampling import SamplingConfig, drawn_tokens, filtered_logits
from gtalign_jax.rollout.servers import EMBEDDED, Server, ServerConfig
from gtalign_jax.types import Array, Completions, Limit, PyTree, Rollout

Write = Callable[[Engine, PyTree, Request], Rollout]


@dataclasses.dataclass(frozen=True)
class EngineConfig(ServerConfig):
    """The fields of `ServerConfig`, and:

    grammar: write only valid chains; our own engine alone can. The trainer's log-probabilities are then
    those under the grammar too. limits: how long each block may get under it, so that one does not leave the
    others without room. compact_every: our own engine goes on with the live rows alone when few are left,
    gathering them at most once in so many decode steps (0: never); worth it where lengths differ much. rows:
    how many rows our own engine decodes at a time, while the others wait for the place of one that is done
    (0: all).
    """

    grammar: bool = False
    limits: BlockLimits = BlockLimits()
    compact_every: int = 0
    rows: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("compact_every", "rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 (off) or positive")
        in_range(self, compact_every=(0, MAX_COUNT), rows=(0, MAX_COUNT))
        if self.grammar and self.kind != EMBEDDED:
            raise ValueError(f"grammar: needs kind='embedded', not {self.kind!r}")
        if self.limits != BlockLimits() and not self.grammar:
            raise ValueError("limits: only the grammar knows blocks; set grammar")


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """rollout: `generate.rollout` or a function of the same signature. server: None for our own engine.
    constraint: the grammar's tables, or None. folder: where weights are handed over to servers."""

    rollout: Write
    server: Server | None
    constraint: Constraint | None
    folder: pathlib.Path


def make_generator(config: EngineConfig, engine: Engine, workdir: pathlib.Path) -> Generator:
    """The generator of a run; nothing is sent to a server yet. UserError for a config that cannot work."""
    server = None if config.kind == EMBEDDED else servers.connect(config)
    if server is not None:
        paths.local(workdir, "--workdir, from which servers load weights,")
        with naming("config."):
            check_sampling(config.kind, engine.sampling)
    write = generate_lib.rollout if server is None else functools.partial(external.rollout, server)
    constraint = make_constraint(engine, config.limits) if config.grammar else None
    return Generator(write, server, constraint, workdir / "engine")


def generate(generator: Generator, engine: Engine, params: PyTree, request: Request) -> Rollout:
    """The run's rollouts, under its grammar; servers answer with the weights of the last `hand_over`."""
    return generator.rollout(engine, params, request.replace(constraint=generator.constraint))


class Shape(NamedTuple):
    """What programs of generation are compiled for: P prompts of S slots, and G completions of up to N tokens
    for each."""

    prompts: int
    slots: int
    group_size: int
    max_new_tokens: int


def compile_largest(
    compiling: Compile, generator: Generator, engine: Engine, params: PyTree, shape: Shape
) -> None:
    """Have the programs compiled that `generate` needs most memory for in this shape; none runs.

    params: arrays or their shapes. Servers see to themselves.
    """
    if generator.server is None:
        engine, request = _first_request(generator, engine, shape)
        prompts = prompt_batch(engine, [[0] * shape.slots] * shape.prompts)
        generate_lib.compile_largest(compiling, engine, params, request.replace(prompts=prompts))


def fitting(purpose: Purpose) -> Compile:
    """Compiles what fits in memory; UserError, with this purpose, for a program that does not."""
    return lambda lowered, beside: compile_to_fit(lowered, purpose, beside)


def warm_up(generator: Generator, engine: Engine, params: PyTree, shape: Shape) -> None:
    """Compile what `generate` will run in this shape; servers see to themselves. UserError for a program that
    does not fit in memory."""
    if generator.server is None:
        compile_largest(fitting(GENERATION), generator, engine, params, shape)
        engine, request = _first_request(generator, engine, shape)
        generate_lib.warm_up(engine, params, request)


def _first_request(generator: Generator, engine: Engine, shape: Shape) -> tuple[Engine, Request]:
    """(the engine with the buckets of this shape alone, a request for it with any prompt)."""
    buckets, prompts = engine.buckets, shape.prompts
    queued = engine.rows and buckets.batch and prompts > buckets.batch[-1]  # no bucket bounds a queue
    rows = bucket(prompts, buckets.batch, "batch", "the batch") if buckets.batch and not queued else prompts
    narrowed = dataclasses.replace(buckets, prompt=(shape.slots,), batch=(rows,))
    engine = dataclasses.replace(engine, buckets=narrowed)
    any_prompt, key = prompt_batch(engine, [[0]]), jax.random.key(0)
    group, tokens = shape.group_size, shape.max_new_tokens
    return engine, Request(any_prompt, key, group, tokens, constraint=generator.constraint)


def hand_over(generator: Generator, engine: Engine, params: PyTree, due: bool = True) -> None:
    """Give the servers these parameters when that is due, or nothing was given yet since this process began;
    nothing to do for our own engine."""
    if generator.server is not None and (due or "pushes" not in numbers(generator)):
        external.push_weights(generator.server, params, engine, generator.folder)


def trainer_limit(generator: Generator, sampling: SamplingConfig, max_new_tokens: int) -> Limit | None:
    """What holds the trainer's distributions to the grammar and the filters, as it held the sampler's."""
    return limit_of(generator.constraint, sampling, max_new_tokens)


def limit_of(constraint: Constraint | None, sampling: SamplingConfig, max_new_tokens: int) -> Limit | None:
    """A grammar, and then the filters of `sampling`, as the trainer is held to them; None without either."""
    limits = []
    if constraint is not None:
        # Host copies, which every program that is compiled with them takes as constants of a few megabytes.
        tables = processes.fetch(constraint)._replace(budget=np.int32(max_new_tokens))
        states, logits = (
            functools.partial(f, tables) for f in (grammar.action_states, grammar.limited_logits)
        )
        limits.append(Limit(states, logits))
    if sampling.filters:
        limits.append(Limit(drawn_tokens, functools.partial(filtered_logits, sampling)))
    if len(limits) < 2:
        return limits[0] if limits else None
    return Limit(functools.partial(_all_states, limits), functools.partial(_all_limited, limits))


def _all_states(limits: Sequence[Limit], completions: Completions) -> tuple[PyTree, ...]:
    return tuple(limit.states(completions) for limit in limits)


def _all_limited(limits: Sequence[Limit], at: tuple[PyTree, ...], logits: Array) -> Array:
    for limit, state in zip(limits, at, strict=True):
        logits = limit.logits(state, logits)
    return logits


def numbers(generator: Generator) -> dict[str, float]:
    """Counters of the servers over the whole run, `requests`, `failed/KIND`, ...; none for our own engine."""
    return {} if generator.server is None else generator.server.pool.numbers()
