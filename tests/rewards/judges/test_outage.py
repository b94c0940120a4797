"""Training through a judge outage: missing verdicts make rows invalid, or zero, as the config says."""

import dataclasses

import numpy as np
import pytest

from gtalign_jax.chain.prompt import format_chain
from gtalign_jax.errors import UserError
from gtalign_jax.rewards.features import FeatureConfig, extract
from gtalign_jax.rewards.judges.http import HttpJudgeConfig, make_http_judge
from gtalign_jax.rewards.mutual_welfare import RewardConfig, resolve_reward


@dataclasses.dataclass(frozen=True)
class Item:
    task: str = "math"
    intent: str = "2 - 1?"
    ground_truth: str = "1"


PAYOFF = np.arange(12, dtype=np.float32).reshape(2, 3, 2) / 10


def completion(words):
    return format_chain("Think.", PAYOFF, "The frontier is DQ_AQ. AQ", words)


def quick_judge(server, **changes):
    fields = dict(endpoints=(server.url,), model="judge", timeout_s=2.0, wait_s=0.0, tries=2)
    return make_http_judge(HttpJudgeConfig(**(fields | changes)))


def test_an_outage_drops_every_judged_row_and_keeps_the_rest(server):
    server.default = "http500"
    texts = [completion(f"id={i}") for i in range(4)] + ["no chain at all"]
    batch = extract(texts, [Item()] * 5, quick_judge(server), FeatureConfig(missing="drop"))
    np.testing.assert_array_equal(batch.features.valid, [False] * 4 + [True])
    assert {v.reason[:8] for v in batch.verdicts[:4]} == {"http 500"}
    assert sum(server.asks.values()) == 8  # the broken chain earns nothing either way: never asked


def test_a_partial_outage_drops_only_the_rows_without_a_verdict(server):
    texts = [completion(f"id={i} " + ("fault=reset" if i % 3 == 0 else "want=1")) for i in range(9)]
    batch = extract(texts, [Item()] * 9, quick_judge(server), FeatureConfig(missing="drop"))
    lost = np.arange(9) % 3 == 0
    np.testing.assert_array_equal(batch.features.valid, ~lost)
    np.testing.assert_array_equal(batch.features.answer_user, np.where(lost, 0.0, 1.0))
    assert [v.score for v in batch.verdicts] == [None if gone else 1.0 for gone in lost]


def test_the_zero_policy_keeps_the_rows_and_still_tells_the_reason(server):
    server.default = "prose"
    batch = extract([completion("id=a")], [Item()], quick_judge(server), FeatureConfig(missing="zero"))
    assert batch.features.valid.tolist() == [True]
    assert batch.features.answer_llm.tolist() == [0.0]
    assert batch.verdicts[0].reason == "no verdict in the judge's text"


@pytest.mark.parametrize("fault", ["http500", "drip", "garbage"])
def test_rewards_stay_finite_without_any_verdict(server, fault):
    server.default = fault
    texts = [completion(f"id={i}") for i in range(3)]
    judge = quick_judge(server, timeout_s=0.3, tries=1)
    batch = extract(texts, [Item()] * 3, judge, FeatureConfig())
    reward = resolve_reward("cobb_douglas")(batch.features, RewardConfig())
    assert np.isfinite(np.asarray(reward.welfare)).all()
    assert not np.asarray(batch.features.valid).any()


@pytest.mark.parametrize(("status", "count"), [(401, 1), (403, 5), (404, 5), (405, 5), (422, 8)])
def test_what_is_refused_for_good_ends_the_run_with_the_reason(server, status, count):
    """A passing outage goes on as before; a wrong key, model, path or field would never be judged."""
    server.default = f"refused{status}"
    texts = [completion(f"id={i}") for i in range(count)]
    line = f"config.judge: all {count} requests were refused .http.*: http {status}: .*; see config.judge"
    with pytest.raises(UserError, match=line) as error:
        extract(texts, [Item()] * count, quick_judge(server), FeatureConfig(missing="drop"))
    assert "\n" not in str(error.value)


def test_a_refusal_among_verdicts_or_of_a_few_odd_requests_ends_nothing(start_server):
    server, lacking = start_server(), start_server()
    texts = [completion(f"id={i} fault=refused401") for i in range(9)]
    batch = extract([*texts, completion("id=good")], [Item()] * 10, quick_judge(server), FeatureConfig())
    assert [v.score for v in batch.verdicts] == [None] * 9 + [1.0]
    texts = [completion(f"id=long{i} fault=http400") for i in range(3)]
    batch = extract(texts, [Item()] * 3, quick_judge(server), FeatureConfig())
    assert {v.reason[:8] for v in batch.verdicts} == {"http 400"}
    lacking.default, server.default = "refused404", "http500"
    both = quick_judge(server, endpoints=(lacking.url, server.url), tries=3)
    batch = extract([completion(f"id=b{i}") for i in range(9)], [Item()] * 9, both, FeatureConfig())
    assert {v.reason[:8] for v in batch.verdicts} <= {"http 500", "http 404"}
