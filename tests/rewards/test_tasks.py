"""A task is a value: one of our own and a user's are found, read, judged and scored by the same code."""

import dataclasses

import numpy as np
import pytest

from gtalign_jax.chain.prompt import format_chain
from gtalign_jax.data import teacher
from gtalign_jax.data.item import make_item
from gtalign_jax.errors import UserError
from gtalign_jax.rewards.features import FeatureConfig, extract
from gtalign_jax.rewards.judges.base import JudgeRequest, Verdict
from gtalign_jax.rewards.judges.rubrics import judge_prompt
from gtalign_jax.rewards.judges.rules import check_rules, judge_by_rules
from gtalign_jax.rewards.judges.verdict import read_verdict
from gtalign_jax.rewards.scale import Scale
from gtalign_jax.rewards.tasks import EMBEDDED, TASKS, resolve_tasks, task_of_source
from gtalign_jax.rewards.tasks.task import Task

MATRIX = np.arange(12.0).reshape(2, 3, 2) / 4
OWN = Task(
    name="cited",
    scale=Scale((0.0, 1.0, 2.0)),
    rule=lambda response, truth, item: None if "?" in response else 2.0 * (truth in response),
    rubric="0: cites nothing.\n1: cites something else.\n2: cites the source.",
    score=lambda verdict, response, truth: (verdict / 2, 1.0, verdict / 2),
)
TASKS_OF_RUN = {"ambig_qa": TASKS["ambig_qa"], "cited": OWN}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(text): the name of a module with this text on the path."""

    def write(text, name="a_module_of_tasks"):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
        return name

    return write


def test_a_task_in_a_module_stands_beside_ours(module):
    name = module("from gtalign_jax.rewards.tasks.task import Task\nCITED = Task('cited')\n")
    assert list(resolve_tasks(["math", f"{name}:CITED"])) == ["math", "cited"]
    assert resolve_tasks(["math"])["math"] is TASKS["math"]
    assert resolve_tasks(["math"], EMBEDDED)["math"].family is not None


@pytest.mark.parametrize(
    ("names", "text", "message"),
    [
        (["poetry"], "", "'poetry' is not a task; known: math, .*advbench, or module:NAME of your own"),
        (["M:GONE"], "", "'a_module_of_tasks:GONE': module 'a_module_of_tasks' has no attribute 'GONE'"),
        (["no_such_module:X"], "", "'no_such_module:X': No module named 'no_such_module'"),
        (["M:X"], "X = 3", "'a_module_of_tasks:X': X is not a Task"),
        (["M:X"], "X = 1 / 0", "'a_module_of_tasks:X': ZeroDivisionError: division by zero"),
        (["M:X"], "X = Task('a b')", "ValueError: name='a b': must be letters, digits"),
        (["M:X"], "X = Task('overall')", "ValueError: name='overall': must be letters, .* and not overall"),
        (["M:X"], "X = Task()", "TypeError: .*missing 1 required positional argument: 'name'"),
        (["M:X"], "X = Task(", "'.' was never closed"),
        (["math", "math"], "", "two tasks are named 'math'"),
        (["math", "M:X"], "X = Task('sums', source='math-hard')", "or read 'math-hard'; keep one"),
    ],
)
def test_a_task_that_cannot_be_had_is_one_line(module, names, text, message):
    name = module(f"from gtalign_jax.rewards.tasks.task import Task\n{text}\n")
    with pytest.raises(UserError, match=f"config.data.tasks.*{message}") as error:
        resolve_tasks([given.replace("M:", f"{name}:") for given in names])
    assert "\n" not in str(error.value)


def test_ours_have_all_that_a_run_may_ask_of_a_task():
    assert [task_of_source(task.source) for task in TASKS.values()] == list(TASKS)
    assert task_of_source("riddles") == "riddles"
    for task in [*TASKS.values(), *EMBEDDED.values()]:
        assert task.rule and task.rubric
    assert [task.name for task in EMBEDDED.values()] == list(EMBEDDED)
    check_rules(TASKS)


def asked(task, truth="Smith 2020"):
    return dataclasses.replace(
        make_item([{"role": "user", "content": "Who?"}], truth), task=task, source=task
    )


def test_a_users_task_is_judged_by_its_rule_and_scored_by_its_score():
    said = ["As Smith 2020 says.", "Nobody knows.", "Which one?"]
    texts = [format_chain("Think.", MATRIX, "choose DA", text) for text in said]
    judge = lambda requests: judge_by_rules(requests, TASKS_OF_RUN)
    batch = extract(texts, [asked("cited")] * 3, judge, FeatureConfig(), tasks=TASKS_OF_RUN)
    assert [v.score for v in batch.verdicts] == [2.0, 0.0, None]
    assert batch.verdicts[2].reason == "the rule gives no verdict"
    np.testing.assert_array_equal(batch.features.valid, [True, True, False])
    np.testing.assert_array_equal(batch.features.answer_user, [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(batch.features.answer_llm, [1.0, 1.0, 0.0])
    np.testing.assert_array_equal(batch.features.source, [1, 1, 1])  # the place in the run's tasks


def test_the_rule_sees_the_item_that_was_asked():
    seen = []
    task = dataclasses.replace(OWN, rule=lambda response, truth, item: seen.append(item) or 1.0)
    text = format_chain("Think.", MATRIX, "choose DA", "Yes.")
    judge = lambda requests: judge_by_rules(requests, {"cited": task})
    item = dataclasses.replace(asked("cited"), name="row-7")
    extract([text], [item], judge, FeatureConfig(), tasks={"cited": task})
    assert seen == [item]


def test_a_language_model_is_asked_the_tasks_rubric_on_its_scale():
    prompt = judge_prompt(JudgeRequest("cited", "Who?", "Smith", "Smith 2020"), TASKS_OF_RUN)
    assert prompt.system.startswith(OWN.rubric) and "one of 0, 1, 2" in prompt.system
    assert "Smith 2020" in prompt.user and prompt.scale == OWN.scale
    assert read_verdict(r"\boxed{2}", "cited", TASKS_OF_RUN) == Verdict(2.0)


def changed(**fields):
    return {"cited": dataclasses.replace(OWN, **fields)}


def extracted(tasks):
    text = format_chain("Think.", MATRIX, "choose DA", "As Smith 2020 says.")
    return extract([text], [asked("cited")], lambda r: judge_by_rules(r, tasks), FeatureConfig(), tasks=tasks)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: check_rules(changed(rule=None)), "'cited' has no rule; give it one, or name a server"),
        (lambda: changed(rubric="")["cited"].rubric_for("x"), "task 'cited' has no rubric"),
        (lambda: extracted(changed(rule=lambda *_: "good")), "task 'cited': its rule gave 'good'"),
        (lambda: extracted(changed(score=lambda *_: 1.0)), "score gave 1.0; it must give .Q_user, Q_llm"),
        (lambda: extracted(changed(score=lambda *_: (1.0, 1.5, 0.0))), "'cited': its score gave .1.0, 1.5"),
        (lambda: extracted({"math": TASKS["math"]}), "task 'cited' has no judge; known: math"),
        (lambda: extracted(changed(score=lambda *_: (float("nan"),) * 3)), "all three must be from 0 to 1"),
    ],
)
def test_what_a_task_gives_is_checked_where_it_is_used(act, message):
    with pytest.raises(UserError, match=message):
        act()


def test_a_verdict_of_a_rule_off_the_scale_is_missing_with_the_reason():
    (verdict,) = judge_by_rules([JudgeRequest("cited", "", "x", "y")], changed(rule=lambda *_: 0.5))
    assert verdict == Verdict(None, "the rule's verdict 0.5 is outside the scale 0, 1, 2")
    (verdict,) = judge_by_rules([JudgeRequest("cited", "", "x", "y")], changed(rule=lambda *_: float("nan")))
    assert verdict.score is None


def test_demonstrations_follow_the_task():
    rng = np.random.default_rng(0)
    ideal = teacher.TeacherConfig(1.0, 1.0, 0.0, 0.0, 1)
    chain = teacher.write_chain(asked("cited"), OWN, rng, ideal)
    assert "<response>\nSmith 2020\n</response>" in chain and "choose DA" in chain
    asks = dataclasses.replace(OWN, right_action=lambda item: "CQ")
    assert "Could you tell me more" in teacher.write_chain(asked("cited"), asks, rng, ideal)
    wrong = dataclasses.replace(OWN, right_action=lambda item: "answer")
    with pytest.raises(
        UserError, match="task 'cited': its right_action gave 'answer'; use one of DA, CQ, AQ"
    ):
        teacher.write_chain(asked("cited"), wrong, rng)


@pytest.mark.parametrize("levels", [(1.0, 0.0), (0.0,), (0.0, 0.0), ()])
def test_a_scale_has_two_levels_or_more_in_order(levels):
    with pytest.raises(ValueError, match="give two or more, the smallest first"):
        Scale(levels)
