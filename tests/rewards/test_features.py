"""From texts to features: lengths, verdict policies, consistency P, plain answers, worker processes."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtalign_jax.chain.prompt import format_chain
from gtalign_jax.errors import UserError
from gtalign_jax.game.moves import ACTIONS, KEYS, USER_MOVES
from gtalign_jax.game.payoff import pareto_frontier
from gtalign_jax.rewards.features import FeatureConfig, extract, frontier_consistency
from gtalign_jax.rewards.judges.base import Verdict
from gtalign_jax.rewards.mutual_welfare import REWARDS, RewardConfig
from gtalign_jax.rewards.reading import CHUNK, count_words
from gtalign_jax.rewards.tasks import TASKS

MATRIX = np.array([[[0, 0], [1, 1], [2, 2]], [[1, 3], [3, 1], [3, 3]]], float)  # DQ_AQ alone is efficient


@dataclasses.dataclass(frozen=True)
class Asked:
    task: str = "math"
    intent: str = "q"
    ground_truth: str = "5"


def chain(response="It is 5.", analyze="choose DQ_AQ", thinking="Think.", matrix=MATRIX):
    return format_chain(thinking, matrix, analyze, response)


def judge_of(score, seen=None):
    def judge(requests):
        if seen is not None:
            seen.extend(requests)
        return [Verdict(score, "" if score is not None else "timeout")] * len(requests)

    return judge


def test_worker_processes_do_not_load_jax():
    code = "import sys, gtalign_jax.rewards.reading; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_is_read_from_one_chain():
    text = chain()
    seen = []
    batch = extract([text], [Asked()], judge_of(1.0, seen), FeatureConfig())
    f = batch.features
    assert [r.response for r in seen] == ["It is 5."]
    assert (f.valid[0], f.format_ok[0], f.payoff_ok[0], f.analyze_ok[0]) == (True,) * 4
    assert (f.answer_user[0], f.answer_llm[0], batch.answer[0]) == (1.0, 1.0, 1.0)
    assert f.reasoning_chars[0] == text.index("<response>")
    assert (f.response_words[0], f.total_words[0]) == (3, len(text.split()))
    assert f.frontier[0] == 1.0 and batch.action == ["AQ"]
    assert f.source[0] == list(TASKS).index("math") and f.source.dtype == np.int32
    np.testing.assert_array_equal(f.payoff[0], MATRIX)
    floats = (f.answer_user, f.payoff, f.frontier, f.reasoning_chars, f.response_words, f.total_words)
    assert all(x.dtype == np.float32 for x in floats)


def test_a_broken_chain_is_not_judged_and_earns_nothing():
    seen = []
    texts = [chain().replace("</response>", ""), chain().replace("0.0", "true"), "", chain()]
    batch = extract(texts, [Asked()] * 4, judge_of(1.0, seen), FeatureConfig())
    assert len(seen) == 1
    np.testing.assert_array_equal(batch.features.payoff_ok, [False, False, False, True])
    np.testing.assert_array_equal(batch.features.valid, True)
    assert not batch.features.payoff[:3].any() and not batch.answer[:3].any()
    reward = REWARDS["cobb_douglas"](batch.features, RewardConfig())
    np.testing.assert_array_equal(np.asarray(reward.welfare) > 0, [False, False, False, True])
    assert all(c.errors for c in batch.chains[:3]) and not batch.chains[3].errors


@pytest.mark.parametrize("score", [None, float("nan"), float("inf")])
@pytest.mark.parametrize(("policy", "valid"), [("drop", False), ("zero", True)])
def test_a_missing_verdict_follows_the_policy(score, policy, valid):
    batch = extract([chain()], [Asked()], judge_of(score), FeatureConfig(missing=policy))
    assert batch.features.valid[0] == valid
    assert (batch.features.answer_user[0], batch.answer[0]) == (0.0, 0.0)


def test_a_judge_that_loses_verdicts_is_an_error():
    with pytest.raises(UserError, match="judge: 0 verdicts for 1 requests"):
        extract([chain()], [Asked()], lambda requests: [], FeatureConfig())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("missing", "skip", "must be drop or zero"),
        ("chain", "x", "gtalign or plain"),
        ("workers", -1, "0 or more"),
    ],
)
def test_bad_settings_name_the_field(field, value, message):
    with pytest.raises(ValueError, match=f"^{field}=.*{message}"):
        FeatureConfig(**{field: value})


def test_plain_answers_keep_the_terms_that_need_no_chain():
    batch = extract(["It is 5.", "  "], [Asked()] * 2, judge_of(1.0), FeatureConfig(chain="plain"))
    f = batch.features
    np.testing.assert_array_equal(f.payoff_ok, [True, False])
    assert (f.response_words[0], f.total_words[0], f.reasoning_chars[0]) == (3, 3, 0)
    reward = REWARDS["cobb_douglas_frontier"](f, RewardConfig())
    assert {k: float(v[0]) for k, v in reward.parts.items() if k in ("format", "payoff", "frontier")} == {
        "format": 0.0,
        "payoff": 0.0,
        "frontier": 0.0,
    }
    assert float(reward.welfare[0]) > 0 and float(reward.welfare[1]) == 0
    assert batch.action == [None, None]


def test_code_fences_count_only_when_asked():
    text = chain().replace("<payoff>\n", "<payoff>\n```json\n").replace("\n</payoff>", "\n```\n</payoff>")
    for fences in (False, True):
        batch = extract([text], [Asked()], judge_of(1.0), FeatureConfig(code_fences=fences))
        assert batch.features.payoff_ok[0] == fences


def test_an_empty_batch_has_the_same_schema():
    f = extract([], [], judge_of(1.0), FeatureConfig()).features
    assert f.payoff.shape == (0, 2, 3, 2) and all(len(x) == 0 for x in jax.tree.leaves(f))


payoffs = st.lists(st.integers(-2, 2), min_size=12, max_size=12).map(lambda n: np.reshape(n, (2, 3, 2)))
choices = st.one_of(st.none(), st.sampled_from(ACTIONS), st.sampled_from(KEYS))


@given(st.lists(st.tuples(payoffs, choices), min_size=1, max_size=8))
@settings(max_examples=300)
def test_consistency_follows_its_rule(rows):
    """Against the definition on each matrix alone, dominance written out."""
    payoff, choice = np.array([p for p, _ in rows], float), [c for _, c in rows]
    expected = []
    for matrix, named in rows:
        cells = {f"{m}_{a}": matrix[i, j] for i, m in enumerate(USER_MOVES) for j, a in enumerate(ACTIONS)}
        efficient = {
            key
            for key, x in cells.items()
            if not any((y >= x).all() and (y > x).any() for y in cells.values())
        }
        same_action = {key for key in efficient if named and key.endswith(named[-2:])}
        whole = named in efficient or (named in ACTIONS and same_action)
        expected.append(1.0 if whole else 0.5 if same_action else 0.0)
    np.testing.assert_array_equal(frontier_consistency(payoff, choice), expected)


def test_the_host_frontier_is_the_one_of_the_game():
    rng = np.random.default_rng(0)
    payoff = rng.integers(-2, 3, (500, 2, 3, 2)).astype(np.float32)
    on_frontier = np.asarray(pareto_frontier(jax.numpy.asarray(payoff)))
    for i, move in enumerate(USER_MOVES):
        for j, action in enumerate(ACTIONS):
            whole = frontier_consistency(payoff, [f"{move}_{action}"] * len(payoff)) == 1.0
            np.testing.assert_array_equal(whole, on_frontier[:, i, j])


texts = st.lists(
    st.one_of(st.none(), st.text(max_size=30), st.text(" \t\n\x0b\x1c\x85\u3000ab", max_size=12)), max_size=8
)


@given(texts)
@settings(max_examples=500)
def test_words_are_counted_as_split_does(texts):
    np.testing.assert_array_equal(count_words(texts), [len((t or "").split()) for t in texts])


def test_words_over_more_than_one_chunk():
    texts = [f"a {'b ' * (i % 7)}{'é' if i % 50 == 0 else ''}" for i in range(3 * CHUNK + 5)]
    np.testing.assert_array_equal(count_words(texts), [len(t.split()) for t in texts])


def test_worker_processes_give_the_same_features():
    rng = np.random.default_rng(1)
    say = lambda: " ".join(rng.choice(["the", "cat", "sat.", "on", "mats"], 20))
    items = [Asked("medium", "q", say()) for _ in range(CHUNK + 60)]
    texts = [chain(response=say(), thinking=say()) for _ in items]
    texts[3], texts[300] = "broken", chain().replace("DQ", "XQ")
    here, there = (extract(texts, items, judge_of(2.0), FeatureConfig(workers=workers)) for workers in (0, 2))
    jax.tree.map(np.testing.assert_array_equal, here.features, there.features)
    assert here.chains == there.chains and here.action == there.action
    np.testing.assert_array_equal(here.answer, there.answer)


def test_a_judge_may_decide_consistency_and_may_fail_to():
    """P comes from the judge where it answers; a sample it cannot judge is missing, not zero."""
    matrix = np.zeros((2, 3, 2))
    texts = [format_chain("t", matrix, f"analysis {i}: choose DA.", "x") for i in range(3)]
    texts.append(format_chain("t", matrix, "", "x").replace("<analyze>\n\n</analyze>\n", ""))
    asked = []

    def consistency(requests):
        asked.extend(requests)
        return [Verdict(0.5), Verdict(None, "timeout"), Verdict(1.0)]

    items = [Asked()] * 4
    judge = lambda requests: [Verdict(1.0) for _ in requests]
    batch = extract(texts, items, judge, FeatureConfig(frontier="judge"), consistency)
    assert batch.features.frontier.tolist() == [0.5, 0.0, 1.0, 0.0]
    assert batch.features.valid.tolist() == [True, False, True, True]
    assert [r.analyze for r in asked] == [f"analysis {i}: choose DA." for i in range(3)]
    with pytest.raises(ValueError, match="^frontier='coin'"):
        FeatureConfig(frontier="coin")
