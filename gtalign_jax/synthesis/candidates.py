"""The candidates of a batch of prompts, written component by component, all prompts together."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gtalign_jax.data.item import Item
from gtalign_jax.mesh import processes
from gtalign_jax.run.progress import stage
from gtalign_jax.synthesis.ask import COMPONENTS, Ask, Made, Teacher, prompt_digest, seed_of
from gtalign_jax.synthesis.checks import Unfit, read_component

SLOW = 10.0  # seconds that a component may take before it is said what is waited for


class Origin(NamedTuple):
    """Where a component came from. tries: how often it was made."""

    teacher: str
    model: str
    seed: int
    tries: int


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A chain in the making. digest: of its prompt. number: which of its prompt's candidates.

    written: components so far; origins: where each is from. failures: why a component was made again, each
    time; rejected: why the candidate was given up, "" while it stands. tokens_in, tokens_out: of models.
    """

    item: Item
    digest: str
    number: int
    written: Mapping[str, str] = dataclasses.field(default_factory=dict)
    origins: Mapping[str, Origin] = dataclasses.field(default_factory=dict)
    failures: tuple[str, ...] = ()
    rejected: str = ""
    tokens_in: int = 0
    tokens_out: int = 0


@dataclasses.dataclass(frozen=True)
class Effort:
    """count: candidates of a prompt. attempts: at most so many of a component. seed: of the run."""

    count: int
    attempts: int
    seed: int


def write_candidates(
    items: Sequence[Item], teachers: Mapping[str, Teacher], effort: Effort
) -> list[Candidate]:
    """`effort.count` candidates in a row of each item."""
    found = [Candidate(item, prompt_digest(item), n) for item in items for n in range(effort.count)]
    for component in COMPONENTS:
        for attempt in range(effort.attempts):
            waiting = [i for i, c in enumerate(found) if not c.rejected and component not in c.written]
            asks = [_ask(found[i], component, attempt, effort.seed) for i in waiting]
            for i, ask, made in zip(waiting, asks, _made(teachers[component], asks), strict=True):
                found[i] = _with(found[i], ask, made, teachers[component], attempt + 1)
        found = [c if component in c.written or c.rejected else _given_up(c) for c in found]
    return found


def _ask(candidate: Candidate, component: str, attempt: int, seed: int) -> Ask:
    number = seed_of(candidate.digest, seed, component, candidate.number, attempt)
    return Ask(candidate.item, component, candidate.written, number)


def _made(teacher: Teacher, asks: Sequence[Ask]) -> list[Made]:
    """What a teacher gives, the same on every host."""
    if not asks:
        return []
    if teacher.on_mesh:
        return teacher.make(asks)
    with stage(f"{asks[0].component} of {len(asks)} candidates", after=SLOW):
        return processes.from_main(lambda: teacher.make(asks))


def _with(candidate: Candidate, ask: Ask, made: Made, teacher: Teacher, tries: int) -> Candidate:
    """The candidate with one component more, or with the reason why the text is none."""
    candidate = dataclasses.replace(
        candidate,
        tokens_in=candidate.tokens_in + made.tokens_in,
        tokens_out=candidate.tokens_out + made.tokens_out,
    )
    try:
        if made.text is None:
            raise Unfit(made.reason)
        text = read_component(ask.component, made.text, candidate.written)
    except Unfit as why:
        failures = (*candidate.failures, f"{ask.component} {why}")
        return dataclasses.replace(candidate, failures=failures)
    origin = Origin(teacher.name, teacher.model, ask.seed, tries)
    return dataclasses.replace(
        candidate,
        written={**candidate.written, ask.component: text},
        origins={**candidate.origins, ask.component: origin},
    )


def _given_up(candidate: Candidate) -> Candidate:
    return dataclasses.replace(candidate, rejected=candidate.failures[-1])
