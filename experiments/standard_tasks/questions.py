"""The questions of the tasks beside this file, made by rule, and how an answer in free text is marked."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset

from gtalign_jax.data.synthetic import make_records
from gtalign_jax.rewards.tasks.embedded import EMBEDDED_MATH, NAMES, THINGS

KIND = 25  # questions of each kind of `schoolbook`
STORIES = 50
OPTIONS = 4
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
CAPITALS = dict(
    pair.split(":")
    for pair in (
        "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Greece:Athens Austria:Vienna "
        "Poland:Warsaw Hungary:Budapest Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen "
        "Ireland:Dublin Russia:Moscow Turkey:Ankara Egypt:Cairo Kenya:Nairobi Japan:Tokyo China:Beijing "
        "Thailand:Bangkok Canada:Ottawa Cuba:Havana Peru:Lima Chile:Santiago"
    ).split()
)


def schoolbook(**_: Any) -> dict[str, Dataset]:
    """100 questions with four answers each, the right one anywhere: 25 % by chance."""
    rng = random.Random(0)
    found = []
    for question, right, wrong in (*_sums(rng), *_sequences(rng), *_neighbours(), *_capitals()):
        choices = [right, *rng.sample(sorted({*wrong} - {right}), OPTIONS - 1)]
        rng.shuffle(choices)
        found.append({"question": question, "choices": choices, "answer": choices.index(right)})
    return {"test": Dataset.from_list(found)}


def story_sums(**_: Any) -> dict[str, Dataset]:
    """Held-out questions of the embedded task `math`, to be answered in free text."""
    records = make_records([EMBEDDED_MATH], "test", STORIES, seed=0)
    asked = [(one["prompt"][-1]["content"], one["reward_model"]["ground_truth"]) for one in records]
    return {"test": Dataset.from_list([{"question": question, "answer": truth} for question, truth in asked])}


def last_number(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the last number of an answer is right; of a chain, that of its response."""
    numbers = re.findall(r"\d+", results[0].rpartition("<response>")[2])
    return {"acc": float(numbers[-1:] == [doc["answer"]])}


Question = tuple[str, str, Sequence[str]]  # what is asked, the right answer, and those that wrong ones are of


def _near(number: int, step: int = 1) -> list[str]:
    return [str(number + step * off) for off in (-2, -1, 1, 2)]


def _sums(rng: random.Random) -> Iterator[Question]:
    for a, b in rng.sample([(a, b) for a in range(3, 10) for b in range(2, 10)], KIND):
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        yield (
            f"{name} has {a} {thing} and finds {b}. How many {thing} has {name} now?",
            str(a + b),
            _near(a + b),
        )


def _sequences(rng: random.Random) -> Iterator[Question]:
    for first, step in rng.sample([(first, step) for first in range(1, 10) for step in range(2, 10)], KIND):
        shown = ", ".join(str(first + i * step) for i in range(4))
        following = first + 4 * step
        yield f"Which number comes next: {shown}?", str(following), _near(following)


def _neighbours() -> Iterator[Question]:
    pairs = [(names, i, side) for side in (1, -1) for names in (DAYS, MONTHS) for i in range(len(names))]
    for names, i, side in pairs[:KIND]:
        kind, where = "day" if names is DAYS else "month", "after" if side == 1 else "before"
        others = [name for name in names if name != names[i]]
        yield f"Which {kind} comes right {where} {names[i]}?", names[(i + side) % len(names)], others


def _capitals() -> Iterator[Question]:
    for country, city in CAPITALS.items():
        yield f"What is the capital of {country}?", city, [*CAPITALS.values()]
