"""A task is one value made of pure functions: how its records are read, judged, scored and demonstrated."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from gtalign_jax.data.family import Family
from gtalign_jax.data.item import Item, Read, Record, read_published, read_question
from gtalign_jax.errors import UserError
from gtalign_jax.game.moves import AQ, CQ, DA
from gtalign_jax.rewards.scale import BINARY, Scale
from gtalign_jax.rewards.tasks.replies import wording


class Judged(Protocol):
    """What judging an answer needs to know of an item."""

    @property
    def task(self) -> str: ...

    @property
    def intent(self) -> str: ...

    @property
    def ground_truth(self) -> str: ...


class AnswerScore(NamedTuple):
    """Q_u and Q_l of the reward, and the score reported as the answer's; all in [0, 1]."""

    user: float
    llm: float
    answer: float


Score = Callable[[float, str, str], tuple[float, float, float]]
"""(verdict, response, truth) → (Q_user, Q_llm, answer), all in [0, 1]."""


@dataclasses.dataclass(frozen=True)
class Rubric:
    """What a language model is asked for a verdict.

    text: what each level means, a line a level. reference: what it may see of the truth, "" for nothing.
    scale: where a verdict must be on another scale than the task's.
    """

    text: str
    reference: str = ""
    scale: Scale | None = None


def same_for_both(verdict: float, response: str, truth: str) -> AnswerScore:
    """A verdict in [0, 1] counts for both sides."""
    del response, truth
    return AnswerScore(verdict, verdict, verdict)


def clamped_score(
    score: Score, ends: tuple[float, float], verdict: float, response: str, truth: str
) -> AnswerScore:
    """The score of a finite verdict, which is first clamped to the ends of its scale.

    A verdict off its scale (100 out of 1) is a judge's slip, not a better answer.
    """
    found = score(min(max(verdict, ends[0]), ends[1]), response, truth)
    if not isinstance(found, tuple) or len(found) != 3:
        raise UserError(f"a task's score gave {found!r}; it must give (Q_user, Q_llm, answer)")
    return AnswerScore(*found)


def always_answer(item: Item) -> str:
    """Every question is clear: answer it."""
    del item
    return DA


def from_truth(item: Item, action: str, correct: bool, rng: np.random.Generator) -> str:
    """A short demonstration: the truth's first words for an answer, a question back for a clarification."""
    del correct, rng
    if action == CQ:
        return "Could you tell me more about what you mean?"
    return with_offer(" ".join(item.ground_truth.split()[:60]) or "I do not know.", action)


def has_truth(item: Item) -> bool:
    """Whether a truth is stored."""
    return bool(item.ground_truth.strip())


def with_offer(answer: str, action: str) -> str:
    """An answer, and one further question where the action asks for it."""
    return answer + (" Shall I say more?" if action == AQ else "")


def reader(
    original: Read | None = None, fields: tuple[str, ...] = (), plain: Read = read_question, in_rows: str = ""
) -> Read:
    """Reads published rows, those of an original schema, and plain records with a question or messages.

    original: reads a record that has all of these fields. plain: reads one that is neither. in_rows: what
    joins the texts of a truth that is a list in published rows; "" refuses one.
    """

    def read(record: Record) -> Item | None:
        if "reward_model" in record:
            return read_published(record, in_rows)
        if original is not None and all(name in record for name in fields):
            return original(record)
        return plain(record)

    return read


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """name: in the config and every table. source: the data_source of its published rows ("": the name).

    read: record → Item, or None for a record that is not for this task; ValueError names a field that is
    wrong. needs_truth: a record of a user's file without a truth is a mistake.
    scale: the verdicts there are. rule: (response, truth, item) → verdict, or None where it has none to give.
    rubric: what a language model is asked, the whole truth as its reference, or truth → Rubric.
    score: (verdict on the scale, response, truth) → Q_user, Q_llm, reported, all in [0, 1]; heavy: it takes
    long enough to be worth another process, which imports it from its module.
    right_action, respond: what the cold start shows: item → DA, CQ or AQ, and (item, action, correct, rng) →
    a response that carries it out. consider: (item, action, rng) → the text of <thinking>. answerable:
    whether the truth holds what an answer needs; where not, the teacher of `synthesis` asks. family: the
    questions of an embedded task.
    """

    name: str
    source: str = ""
    read: Read = reader(plain=functools.partial(read_question, several="\n"))
    needs_truth: bool = True
    scale: Scale = BINARY
    rule: Callable[[str, str, Judged], float | None] | None = None
    rubric: str | Callable[[str], Rubric] = ""
    score: Score = same_for_both
    heavy: bool = False
    right_action: Callable[[Item], str] = always_answer
    respond: Callable[[Item, str, bool, np.random.Generator], str] = from_truth
    consider: Callable[[Item, str, np.random.Generator], str] = wording.consider
    answerable: Callable[[Item], bool] = has_truth
    family: Family | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name == "overall":
            raise ValueError(f"name={self.name!r}: must be letters, digits, '.', _ and -, and not overall")
        if not self.source:
            object.__setattr__(self, "source", self.name)

    def answer_score(self, verdict: float, response: str, truth: str) -> AnswerScore:
        """The score of a finite verdict, as `clamped_score`."""
        return clamped_score(self.score, self.scale.ends, verdict, response, truth)

    def rubric_for(self, truth: str) -> Rubric:
        """What a judge of an answer to a question with this truth is asked; its scale is set."""
        if not self.rubric:
            raise UserError(
                f"task {self.name!r} has no rubric, which a language model as judge needs; give it one"
            )
        found = Rubric(self.rubric, truth) if isinstance(self.rubric, str) else self.rubric(truth)
        return dataclasses.replace(found, scale=found.scale or self.scale)


Tasks = Mapping[str, Task]
"""The tasks of a run by name, in their order: the index of one is `Features.source`."""


def named(tasks: Tasks, name: str) -> Task:
    """The task of a name; UserError lists the known ones."""
    if name not in tasks:
        raise UserError(f"task {name!r} has no judge; known: {', '.join(tasks)}")
    return tasks[name]
