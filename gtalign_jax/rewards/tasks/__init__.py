"""What is asked and what an answer is worth: one `Task` a value, by name; a user's own stand beside ours."""

from collections.abc import Sequence

from gtalign_jax.config import load_value
from gtalign_jax.errors import UserError
from gtalign_jax.rewards.tasks import ambiguity, embedded, math, safety, writing
from gtalign_jax.rewards.tasks.task import AnswerScore, Task, Tasks, named

_PUBLISHED = (
    math.MATH,
    writing.MEDIUM,
    ambiguity.AMBIG_QA,
    safety.WILDGUARD,
    math.MINERVA_MATH,
    ambiguity.AMBIG_COQA,
    safety.ADVBENCH,
)
_EMBEDDED = (
    embedded.EMBEDDED_MATH,
    embedded.EMBEDDED_MEDIUM,
    embedded.EMBEDDED_AMBIG_QA,
    embedded.EMBEDDED_WILDGUARD,
)
TASKS: Tasks = {task.name: task for task in _PUBLISHED}
EMBEDDED: Tasks = {task.name: task for task in _EMBEDDED}


def resolve_tasks(
    names: Sequence[str], registry: Tasks = TASKS, where: str = "config.data.tasks"
) -> dict[str, Task]:
    """The tasks of a run, in order: each a name of the registry, or module:NAME of a `Task` there.

    where: what named them. UserError for a name that is neither, or two tasks of one name or source.
    """
    tasks: dict[str, Task] = {}
    for name in names:
        if ":" not in name and name not in registry:
            known = ", ".join(registry)
            raise UserError(f"{where}: {name!r} is not a task; known: {known}, or module:NAME of your own")
        task = registry[name] if name in registry else load_value(name, where, Task)
        if task.name in tasks or task.source in [other.source for other in tasks.values()]:
            raise UserError(f"{where}: two tasks are named {task.name!r} or read {task.source!r}; keep one")
        tasks[task.name] = task
    return tasks


def answer_score(task: str, verdict: float, response: str, truth: str, tasks: Tasks = TASKS) -> AnswerScore:
    """The answer score of a finite verdict on an answer to a question of a task."""
    return named(tasks, task).answer_score(verdict, response, truth)


def task_of_source(source: str) -> str:
    """The name of the published task that reads this data_source; another is a task of its own."""
    return _OF_SOURCE.get(source, source)


_OF_SOURCE = {task.source: task.name for task in _PUBLISHED}
