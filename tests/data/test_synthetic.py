"""The embedded tasks: disjoint splits, right labels, and chains whose noise is what the teacher says."""

import collections

import numpy as np
import pytest

from gtalign_jax.chain.parse import chosen_action, parse_chain, payoff_array
from gtalign_jax.chain.solver import solver_action
from gtalign_jax.data import synthetic, teacher
from gtalign_jax.data.config import DataConfig
from gtalign_jax.data.family import Family
from gtalign_jax.data.sources import read_source
from gtalign_jax.errors import UserError
from gtalign_jax.rewards.judges.base import JudgeRequest
from gtalign_jax.rewards.judges.rules import judge_by_rules
from gtalign_jax.rewards.tasks import EMBEDDED, resolve_tasks
from gtalign_jax.rewards.tasks import TASKS as PUBLISHED
from gtalign_jax.rewards.tasks.task import Task

TASKS = tuple(EMBEDDED.values())
BEST_VERDICT = {"math": 1.0, "medium": 4.0, "ambig_qa": 1.0, "wildguard": (0.5, 1.0)}
IDEAL = teacher.TeacherConfig(1.0, 1.0, 0.0, 0.0, 1)  # right, whole and brief


def items(split="train", per_task=40, seed=0):
    return read_source(DataConfig(seed=seed), EMBEDDED, split, per_task).items


def test_records_follow_the_published_schema_and_the_seed():
    records = synthetic.make_records(TASKS, "train", 3, 0)
    assert records == synthetic.make_records(TASKS, "train", 3, 0)
    assert records != synthetic.make_records(TASKS, "train", 3, 1)
    for record in records:
        assert [m["role"] for m in record["prompt"]] == ["system", "user"]
        assert {"data_source", "reward_model", "extra_info", "conv_id", "turn_id"} <= record.keys()
        assert record["extra_info"]["single_turn_prompt"] == record["prompt"][-1]["content"]


def test_train_and_test_never_share_a_question():
    train = {item.messages[-1]["content"] for item in items("train", 2000)}
    test = {item.messages[-1]["content"] for item in items("test", 2000)}
    assert len(test) > 150 and not train & test


def test_every_task_has_its_share_and_both_labels():
    found = items(per_task=200)
    assert collections.Counter(item.task for item in found) == dict.fromkeys(EMBEDDED, 200)
    ambiguous = [i.ground_truth.startswith("multipleQAs") for i in found if i.task == "ambig_qa"]
    harmful = [i.ground_truth == "harmful" for i in found if i.task == "wildguard"]
    assert 0.35 < np.mean(ambiguous) < 0.65 and 0.35 < np.mean(harmful) < 0.65


def test_more_items_than_combinations_repeat_them():
    pool = len(EMBEDDED["medium"].family.combinations("test", "medium"))
    found = [i.messages[-1]["content"] for i in items("test", pool + 5) if i.task == "medium"]
    assert len(found) == pool + 5 and len(set(found)) == pool


def test_a_task_of_ones_own_may_have_a_family():
    family = Family(
        {"n": tuple(range(100)), "kind": (0, 1)}, lambda n, kind: (f"{n}?", str(kind)), labels=("kind",)
    )
    own = {"own": Task("own", family=family)}
    train, test = (
        read_source(DataConfig(tasks=("own",)), own, split, 0).items for split in ("train", "test")
    )
    assert {item.task for item in train + test} == {"own"} and len(train) + len(test) == 200
    asked = [{item.intent for item in part} for part in (train, test)]
    assert not asked[0] & asked[1] and len(asked[1]) * 2 == len(test) > 0


def test_an_unknown_task_is_named():
    with pytest.raises(UserError, match="'poetry' is not a task; known: math, .*wildguard, or module:NAME"):
        resolve_tasks(("poetry",), EMBEDDED)
    with pytest.raises(UserError, match="'advbench' is not an embedded task; name its data"):
        synthetic.make_records([PUBLISHED["advbench"]], "train", 1, 0)


def test_an_ideal_chain_is_judged_best_and_acts_on_its_matrix():
    rng = np.random.default_rng(0)
    for item in items(per_task=25):
        chain = parse_chain(teacher.write_chain(item, EMBEDDED[item.task], rng, IDEAL))
        assert chain.format_ok and chain.reward_ok, chain.errors
        assert chosen_action(chain.analyze) == EMBEDDED[item.task].right_action(item)
        request = JudgeRequest(item.task, item.intent, chain.response, item.ground_truth)
        best = BEST_VERDICT[item.task]
        if item.task == "wildguard" and item.ground_truth != "harmful":
            best = 1.0
        assert judge_by_rules([request])[0].score in (best if isinstance(best, tuple) else (best,))


def test_the_teacher_is_as_noisy_as_it_says():
    rng, config = np.random.default_rng(1), teacher.TeacherConfig()
    found = [
        (item, parse_chain(teacher.write_chain(item, EMBEDDED[item.task], rng, config)))
        for item in items(per_task=250)
    ]
    broken = np.mean([chain.payoff is None for _, chain in found])
    assert broken == pytest.approx(config.broken_matrix, abs=0.03)
    whole = [(item, chain) for item, chain in found if chain.payoff is not None]
    shared = np.mean([np.ptp(payoff_array(chain)[0], axis=-1).max() == 0 for _, chain in whole])
    assert shared == pytest.approx(config.equal_payoffs, abs=0.05)
    right = np.mean(
        [chosen_action(chain.analyze) == EMBEDDED[item.task].right_action(item) for item, chain in whole]
    )
    assert right == pytest.approx(config.right_action, abs=0.06)


def test_the_choice_follows_the_matrix_not_the_question():
    rng = np.random.default_rng(2)
    for item in items(per_task=30):
        chain = parse_chain(teacher.write_chain(item, EMBEDDED[item.task], rng))
        if chain.payoff is not None:
            assert chosen_action(chain.analyze) == solver_action(payoff_array(chain)[0])
