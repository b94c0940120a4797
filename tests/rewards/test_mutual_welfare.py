"""The reward: formulas in float64, recorded published values where no defect is in play, safety at W."""

import json
import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtalign_jax.chain.prompt import format_chain
from gtalign_jax.errors import UserError
from gtalign_jax.rewards.features import FeatureConfig, extract
from gtalign_jax.rewards.judges.base import JudgeRequest, Verdict
from gtalign_jax.rewards.mutual_welfare import (
    REWARDS,
    RewardConfig,
    component_weights,
    payoff_score,
    resolve_reward,
    welfare_parts,
)
from gtalign_jax.types import Features, Reward

CONFIG = RewardConfig()


def one(**changes) -> Features:
    """Features of a single ordinary completion."""
    values = {
        "valid": True,
        "format_ok": True,
        "answer_user": 1.0,
        "answer_llm": 1.0,
        "payoff": np.arange(12.0).reshape(2, 3, 2),
        "payoff_ok": True,
        "frontier": 0.5,
        "reasoning_chars": 400.0,
        "response_words": 120.0,
        "total_words": 700.0,
        "source": 0,
        **changes,
    }
    return Features(**{name: jnp.asarray([value]) for name, value in values.items()})


def _sigmoid(x):
    return 1 / (1 + math.exp(-x))


def _band(n, low, high):
    return _sigmoid(0.005 * (n - low)) * _sigmoid(0.005 * (high - n))


def by_formula(f: Features, frontier: bool) -> tuple[float, float]:
    """(U, L) of one completion by the paper's section 3, in float64."""
    x = {name: float(getattr(f, name)[0]) for name in ("answer_user", "answer_llm", "frontier")}
    m = 0.0
    for cell in np.asarray(f.payoff[0], np.float64).reshape(-1, 2):
        gap = abs(cell[0] - cell[1])
        m += (gap > 0) / 12 + (gap / max(*abs(cell), 1e-8) > 0.1 + 1e-5) / 12
    words, chars = float(f.total_words[0]), float(f.reasoning_chars[0])
    user = 1e-4 + 0.5 * x["answer_user"] + 0.2 * _band(float(f.response_words[0]), 20, 500)
    user += 0.3 * math.exp(-chars / 500)
    llm = 1e-4 + 0.2 * float(f.format_ok[0]) + 0.2 * m
    if frontier:
        llm += 0.2 * x["frontier"] + 0.35 * x["answer_llm"] + 0.05 * _band(words, 500, 1000)
    else:
        llm += 0.4 * x["answer_llm"] + 0.2 * _band(words, 500, 1000)
    return user, llm


WELFARE = {
    "cobb_douglas": lambda u, v: math.sqrt(u * v),
    "cobb_douglas_frontier": lambda u, v: math.sqrt(u * v),
    "linear": lambda u, v: (u + v) / 2,
    "user": lambda u, v: u,
    "llm": lambda u, v: v,
    "rawlsian": min,
    "ces": lambda u, v: 2 / (1 / u + 1 / v),  # the default rho is -1, the harmonic mean
    "nash_bargaining": lambda u, v: u * v,
}
shares = st.floats(0, 1, width=32)
cells = st.lists(st.integers(-50, 50).map(lambda n: n / 10), min_size=12, max_size=12)


@pytest.mark.parametrize("name", REWARDS)
@given(shares, shares, cells, st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.integers(0, 3000))
@settings(max_examples=40)
def test_rewards_are_their_formulas(name, q_user, q_llm, numbers, frontier, format_ok, count):
    f = one(
        answer_user=q_user,
        answer_llm=q_llm,
        payoff=np.reshape(numbers, (2, 3, 2)).astype(np.float32),
        frontier=frontier,
        format_ok=format_ok,
        reasoning_chars=float(count),
        response_words=float(count // 3),
        total_words=float(count),
    )
    user, llm = by_formula(f, name == "cobb_douglas_frontier")
    reward = REWARDS[name](f, CONFIG)
    np.testing.assert_allclose([reward.user[0], reward.llm[0]], [user, llm], atol=1e-6)
    np.testing.assert_allclose(reward.welfare[0], WELFARE[name](user, llm), atol=1e-6)
    assert reward.welfare.dtype == jnp.float32


@pytest.mark.parametrize("name", REWARDS)
def test_nothing_is_due_without_a_response_or_matrix(name):
    reward = jax.jit(REWARDS[name], static_argnums=1)(one(payoff_ok=False), CONFIG)
    assert all(float(x[0]) == 0.0 for x in jax.tree.leaves(reward))


def test_the_evaluation_variant_needs_an_analysis():
    for known, due in ((True, True), (False, False)):
        f = one(analyze_ok=known)
        assert (float(REWARDS["cobb_douglas_frontier"](f, CONFIG).welfare[0]) > 0) == due
        assert float(REWARDS["cobb_douglas"](f, CONFIG).welfare[0]) > 0


@pytest.mark.parametrize("name", REWARDS)
def test_gradients_are_finite_everywhere(name):
    for user, llm, due in ((0.0, 0.0, True), (1.0, 0.0, True), (0.3, 0.9, True), (0.0, 0.0, False)):
        f = one(answer_user=user, answer_llm=llm, payoff_ok=due)
        loss = lambda u, v, f=f: REWARDS[name](f.replace(answer_user=u, answer_llm=v), CONFIG).welfare[0]
        gradients = jax.grad(loss, argnums=(0, 1))(f.answer_user, f.answer_llm)
        assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize(
    ("llm", "user", "score"),
    [
        (1.0, 1.0, 0.0),
        (0.0, -0.0, 0.0),
        (1.0, 0.9, 0.5),  # exactly a tenth, whichever way its binary fractions round
        (-4.0, -3.6, 0.5),
        (1.1, 0.99, 0.5),
        (1.0, 0.8, 1.0),
        (5.0, -5.0, 1.0),
        (0.0, 0.1, 1.0),
    ],
)
def test_a_cell_earns_for_payoffs_that_truly_differ(llm, user, score):
    payoff = jnp.tile(jnp.array([llm, user], jnp.float32), (1, 2, 3, 1))
    assert float(payoff_score(payoff)[0]) == pytest.approx(score, abs=1e-6)


def test_parts_and_their_weights_add_up_to_both_utilities():
    f, weights = one(), component_weights(CONFIG.with_frontier())
    user, llm, parts = welfare_parts(f, CONFIG.with_frontier())
    assert set(parts) == set(weights)
    total = sum(weights[name] * float(parts[name][0]) for name in parts)
    assert total + 2e-4 == pytest.approx(float(user[0] + llm[0]), abs=1e-6)


# Recorded published values ---------------------------------------------------------------------------


def _has_an_exact_tenth(row) -> bool:
    pairs = [[Decimal(str(x)) for x in row[i : i + 2]] for i in range(0, 12, 2)]
    return any(10 * abs(a - b) == max(abs(a), abs(b)) != 0 for a, b in pairs)


def test_published_values_where_no_defect_is_in_play(shared):
    """Well-formed chains of tasks with a 0/1 verdict: there our definitions are the published ones."""
    compared = 0
    lines = (shared / "golden" / "reward_golden.jsonl").open()
    records = [r for r in map(json.loads, lines) if r["task"] in ("math", "ambig_qa")]
    records = [r for r in records if r["payoff_kind"] == "ok" and r["chain_shape"] == "ok"]
    for record in records:
        expected = record["expected"]["cobb_douglas"]
        if "exception" in expected or expected["answer_reward"] not in (0, 1):
            continue
        item = JudgeRequest(record["task"], "", "", record["ground_truth"])
        asked = type("Item", (), {"task": item.task, "intent": "", "ground_truth": item.ground_truth})
        judge = lambda requests, e=expected: [Verdict(float(e["answer_reward"]))] * len(requests)
        batch = extract([record["completion"]], [asked], judge, FeatureConfig())
        chain = batch.chains[0]
        if any(error.endswith(": empty") for error in chain.errors):  # the published format ignores it
            continue
        if not chain.reward_ok or _has_an_exact_tenth(chain.row):  # over our bound; decided by rounding
            continue
        for name in ("cobb_douglas", "linear", "user", "llm"):
            reward = REWARDS[name](batch.features, CONFIG)
            wanted = record["expected"][name]
            got = [reward.user[0], reward.llm[0], reward.welfare[0]]
            np.testing.assert_allclose(
                got, [wanted["user_reward"], wanted["llm_reward"], wanted["score"]], atol=1e-6
            )
        compared += 1
    assert compared > 60


# Safety at the level of W ----------------------------------------------------------------------------

ASKED = {"wildguard": "harmful", "advbench": "Sure, here is how to do it"}


def welfare_of(task: str, verdict: float | None, name: str, words: int, missing: str = "drop") -> np.ndarray:
    text = format_chain("Think.", np.arange(12.0).reshape(2, 3, 2), "choose DQ_AQ", "word " * words)
    asked = type("Item", (), {"task": task, "intent": "", "ground_truth": ASKED[task]})
    judge = lambda requests: [Verdict(verdict)] * len(requests)
    batch = extract([text], [asked], judge, FeatureConfig(missing=missing))
    reward = REWARDS[name](batch.features, CONFIG)
    return np.array([reward.user[0], reward.llm[0], reward.welfare[0]])


@pytest.mark.parametrize("task", ASKED)
@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("words", [3, 200, 900])
def test_complying_with_harm_is_worth_least_to_everyone(task, name, words):
    comply, alternative, refuse = (welfare_of(task, v, name, words) for v in (0.0, 0.5, 1.0))
    assert (comply <= refuse).all() and comply[2] < refuse[2]
    assert (refuse <= alternative).all()
    if name not in ("llm", "rawlsian"):  # both refusals are the same to the LLM, which may be the worse off
        assert refuse[2] < alternative[2]


@pytest.mark.parametrize("name", REWARDS)
def test_an_empty_answer_is_worth_nothing(name):
    assert (welfare_of("wildguard", 1.0, name, 0) == 0).all()
    assert (welfare_of("wildguard", 1.0, name, 1) > 0).any()


@pytest.mark.parametrize("task", ASKED)
def test_a_missing_verdict_never_beats_a_refusal(task):
    missing = welfare_of(task, None, "cobb_douglas", 50, missing="zero")
    assert (missing <= welfare_of(task, 1.0, "cobb_douglas", 50)).all()


# A reward of one's own ---------------------------------------------------------------------------------


def test_rewards_are_found_by_name_or_by_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_for_test.py").write_text(
        "import jax.numpy as jnp\n"
        "from gtalign_jax.rewards.mutual_welfare import welfare_parts\n"
        "from gtalign_jax.types import Reward\n"
        "def brief(features, config):\n"
        "    user, llm, parts = welfare_parts(features, config)\n"
        "    short = jnp.exp(-features.total_words / 200)\n"
        "    return Reward(user, llm, jnp.minimum(user, llm) * short, {**parts, 'short': short})\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    brief = resolve_reward("my_rewards_for_test:brief")
    reward = jax.jit(brief, static_argnums=1)(one(), CONFIG)
    assert isinstance(reward, Reward) and 0 < float(reward.welfare[0]) < 1
    assert resolve_reward("linear") is REWARDS["linear"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "use one of cobb_douglas"),
        (":x", "write module:function"),
        ("math:nope", "no attribute"),
        ("no_such_module_here:f", "No module named"),
        ("math:pi", "pi is not a function"),
    ],
)
def test_a_reward_that_is_not_there_is_one_line(name, message):
    with pytest.raises(UserError, match=f"config.reward.fn='{name}': .*{message}"):
        resolve_reward(name)
    with pytest.raises(UserError, match=f"^--reward='{name}': .*{message}"):
        resolve_reward(name, "--reward")
