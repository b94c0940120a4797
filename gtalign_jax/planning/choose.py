"""What a config leaves to us (`auto`): the cheapest setting whose programs fit the memory of a device.

Tried in this order, each compiled and never run:

    microbatches      the fewest; more of them compute the same, a little less at a time
    start.attention   as the rows' length says, then in blocks of keys
    start.remat       none, dots, full: what is not kept is computed again, up to a third more work
    rollout_prompts   the most at a time

What a program needs falls along each list, so of a list of n at most 2 + log2(n) are compiled.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import ml_collections

from gtalign_jax.errors import UserError
from gtalign_jax.mesh import processes
from gtalign_jax.mesh.memory import COLD_START, GENERATION, GIB, UPDATE, Purpose, free_bytes
from gtalign_jax.mesh.sharding import batch_shards
from gtalign_jax.models.config import REMAT
from gtalign_jax.planning.needs import Need, Needs, needs_of_run
from gtalign_jax.planning.sizes import Say
from gtalign_jax.run import auto
from gtalign_jax.run.job import Job
from gtalign_jax.run.progress import stage
from gtalign_jax.run.settings import Settings, make_settings

T = TypeVar("T")
HEADROOM = 0.1  # share of what is free that is left to the host's own work and to what others take meanwhile


class _Phase(NamedTuple):
    """Programs that are chosen for: what they are, their need, and `field` with its values, cheapest first;
    (None,) where it is not to be chosen."""

    purpose: Purpose
    need: Need
    field: str
    values: Sequence[int | None]


@dataclasses.dataclass
class _Search:
    """config: with `auto` in it. free: bytes there are. tried: (program, its fields) → bytes it needs."""

    config: ml_collections.ConfigDict
    free: float
    say: Say
    tried: dict[tuple[Purpose, tuple], float] = dataclasses.field(default_factory=dict)

    def settle(
        self, phases: Sequence[_Phase], given: Mapping[str, Any], sparing: bool = False
    ) -> tuple[dict[str, Any], _Phase | None]:
        """(what is given and the cheapest values that fit beside it, None), or up to the phase of which none
        fits. sparing: the cheapest is unlikely to."""
        chosen = dict(given)
        for phase in phases:
            trials = [dict(given) | _value(phase.field, value) for value in phase.values]
            found = first_fitting(trials, functools.partial(self._fits, phase), sparing)
            if found is None:
                return chosen, phase
            chosen |= found
        return chosen, None

    def _fits(self, phase: _Phase, values: Mapping[str, Any]) -> bool:
        key = phase.purpose, tuple(values.items())
        if key not in self.tried:
            self.tried[key] = phase.need(make_settings(auto.with_values(self.config, values)))
            self.say(f"auto: {phase.purpose.name} with {_said(values)} needs {self.tried[key] / GIB:.2f} GiB")
        return self.tried[key] <= self.free

    def refusal(self, phase: _Phase) -> UserError:
        """The line about a phase that fits with nothing, and with what it needs least."""
        found = {values: need for (purpose, values), need in self.tried.items() if purpose == phase.purpose}
        values, need = min(found.items(), key=lambda item: item[1])
        fields = auto.asked(self.config)
        left = [f"set config.{name}=auto" for name in (phase.field, "start.remat") if name not in fields]
        if not self.config.start.scan_layers:
            left.append("set config.start.scan_layers=True")
        left.append("lower config.max_new_tokens, buckets.prompt or align.group_size")
        name, least = phase.purpose.name, f"{need / GIB:.2f} GiB with {_said(dict(values))}"
        return UserError(
            f"out of memory: {name} needs {least}, and a device has {self.free / GIB:.2f} GiB for it; "
            f"{', '.join(left)}, set config.lora.rank, or split more with config.mesh"
        )


def choose(
    config: ml_collections.ConfigDict, needs: Needs, free: float, shards: int, say: Say
) -> dict[str, Any]:
    """Field → value for every field that is to be chosen (`auto.asked`).

    free: bytes of a device's memory. shards: devices that split a batch. Raises UserError, a line with the
    program, its least need, what there is and the fields to change, where nothing fits.
    """
    search, fields = _Search(config, free, say), auto.asked(config)
    learning, generation = _phases(make_settings(config), fields, needs, shards)
    for i, computed in enumerate(_computed(fields)):
        chosen, missing = search.settle(learning, computed, sparing=i > 0)
        if missing is None:
            break
    if missing is None:
        attention = {field: value for field, value in chosen.items() if field == auto.ATTENTION}
        found, missing = search.settle(generation, attention)
        chosen |= found
    if missing is not None:
        raise search.refusal(missing)
    return {field: chosen.get(field, auto.FIELDS.get(field, auto.AUTO)) for field in fields}


def _phases(
    settings: Settings, fields: Sequence[str], needs: Needs, shards: int
) -> tuple[list[_Phase], list[_Phase]]:
    """What learns and what generates in a run, with the values of each one's field."""
    sft, align, algorithm = settings.sft, settings.align, settings.algorithm
    learning, generation = [], []
    if sft.trains:
        field = "sft.microbatches"
        counts = _divisors(sft.prompts // shards) if field in fields else (None,)
        learning.append(_Phase(COLD_START, needs.sft, field, counts))
    if align.steps:
        field, counts = "algorithm.microbatches", (None,)
        if field in fields and not algorithm.microbatch_tokens:
            counts = _divisors(align.prompts // algorithm.minibatches // shards)
        learning.append(_Phase(UPDATE, needs.update, field, counts))
        field = "align.rollout_prompts"
        counts = _prompts_at_once(align.prompts, shards) if field in fields else (None,)
        generation.append(_Phase(GENERATION, needs.rollout, field, counts))
    return learning, generation


def first_fitting(values: Sequence[T], fits: Callable[[T], bool], sparing: bool = False) -> T | None:
    """The first that fits of values whose need falls from one to the next; None when the last does not.

    sparing: the last is tried before the first.
    """
    low, high = -1, len(values) - 1
    if not sparing or not high:
        if fits(values[0]):
            return values[0]
        low = 0
    if low == high or not fits(values[high]):
        return None
    while high - low > 1:  # what is at low does not fit, what is at high does
        middle = (low + high) // 2
        low, high = (low, middle) if fits(values[middle]) else (middle, high)
    return values[high]


def _computed(fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """How layers may be computed, cheapest first."""
    kinds = REMAT if "start.remat" in fields else (None,)
    ways = (auto.AUTO, "chunked") if auto.ATTENTION in fields else (None,)
    for i, kind in enumerate(kinds):
        for way in ways if not i else ways[-1:]:
            yield _value("start.remat", kind) | _value(auto.ATTENTION, way)


def _value(field: str, value: Any) -> dict[str, Any]:
    return {} if value is None else {field: value}


def _divisors(count: int) -> Sequence[int]:
    return [n for n in range(1, count + 1) if count % n == 0] or [1]


def _prompts_at_once(prompts: int, shards: int) -> Sequence[int]:
    """Values of `align.rollout_prompts`, the most prompts first; fewer than the devices that split them would
    be filled up."""
    return [0, *(n for n in _divisors(prompts)[-2::-1] if n >= shards)]


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}={value}" for field, value in values.items()) or "the settings as they are"


def choose_for_run(config: ml_collections.ConfigDict, job: Job, free: float | None = None) -> dict[str, Any]:
    """`choose` for the programs of a job, before its model is loaded; the same on all hosts.

    free: bytes of a device's memory to choose for; None: what is free on the fullest, less HEADROOM. Raises
    UserError as `choose` does.
    """
    if free is None:
        known = [bytes_ for bytes_ in processes.all_gather(free_bytes()) if bytes_ is not None]
        free = (1 - HEADROOM) * min(known, default=math.inf)
    if job.mesh_judge is not None:  # its weights stay; what it computes in is free again for others
        free -= job.mesh_judge.run.weight_bytes
    say = _say if processes.is_main() else _say_nothing
    if free == math.inf:
        say("auto: how much memory there is cannot be known here; the cheapest is taken")
        return {field: auto.FIELDS.get(field, auto.AUTO) for field in auto.asked(config)}
    with jax.set_mesh(job.mesh), stage("choose what fits the memory"):
        chosen = choose(config, needs_of_run(job, say), free, batch_shards(job.mesh), say)
    say(f"auto: {_said(chosen)}, for {free / GIB:.1f} GiB on a device")
    return chosen


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say_nothing(line: str) -> None:
    """What another host says."""
