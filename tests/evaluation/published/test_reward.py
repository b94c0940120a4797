"""The reference reproduces what the published code returned on every recorded input, and is linear."""

import dataclasses
import json
import math
import re
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtalign_jax.errors import UserError
from gtalign_jax.evaluation.published import chain, reward, score
from gtalign_jax.rewards.mutual_welfare import REWARDS, RewardConfig
from gtalign_jax.rewards.tasks import TASKS
from gtalign_jax.types import Features

FILES = ("reward_golden.jsonl", "reward_edge_golden.jsonl")
KEYS = sorted(chain.KEYS)
# Our name of each recorded variant.
VARIANTS = {name: name for name in reward.VARIANTS} | {"ablation": reward.FRONTIER}


@pytest.fixture(scope="module")
def records(shared) -> list[dict]:
    return [json.loads(line) for name in FILES for line in (shared / "golden" / name).open(encoding="utf-8")]


def _near(got: float, want) -> bool:
    want = float(want)  # non-finite numbers are stored as strings
    return abs(got - want) <= 1e-9 or got == want or (math.isnan(got) and math.isnan(want))


@pytest.mark.parametrize("recorded", ["cobb_douglas", "linear", "user", "llm", "ablation"])
def test_every_recorded_field(records, recorded):
    chosen = [r for r in records if recorded in r["expected"]]
    assert len(chosen) >= 400
    wrong = []
    for record, fields in zip(chosen, score.score_lines(chosen, VARIANTS[recorded]), strict=True):
        want = record["expected"][recorded]
        if "exception" in want:
            want = dict.fromkeys(("score", "user_reward", "llm_reward", "utility", "answer_reward"), 0)
        wrong += [
            (record["id"], key, fields[key], want[key]) for key in want if not _near(fields[key], want[key])
        ]
    assert wrong == []


@pytest.mark.parametrize("recorded", ["cobb_douglas", "linear", "user", "llm", "ablation"])
def test_it_raises_exactly_where_the_published_code_raised(records, recorded):
    found, wanted = {}, {}
    for record in records:
        if recorded not in record["expected"]:
            with pytest.raises(score.PublishedError, match="NotImplementedError"):
                score.read_line(record, VARIANTS[recorded])
            continue
        wanted[record["id"]] = record["expected"][recorded].get("exception")
        try:
            score.read_line(record, VARIANTS[recorded])
            found[record["id"]] = None
        except score.PublishedError as error:
            found[record["id"]] = error.kind
    assert found == wanted
    assert sum(kind is not None for kind in wanted.values()) >= 4


def test_jitted_float32_formulas_agree_with_host_float64(records):
    """The same features through `mutual_welfare`: U, L, W to 1e-6 of the float64 path."""
    comparable = {name: _comparable(records, name) for name in ("cobb_douglas", reward.FRONTIER)}
    for variant in reward.VARIANTS:
        chosen, readings, matrices = comparable.get(variant, comparable["cobb_douglas"])
        measures = score.collect(readings)
        want = reward.formulas(measures, variant)
        features = _features(measures, matrices, [r["task"] for r in chosen])
        got = jax.jit(REWARDS[variant], static_argnums=1)(features, RewardConfig())
        np.testing.assert_allclose(got.user, want["user_reward"], atol=1e-6)
        np.testing.assert_allclose(got.llm, want["llm_reward"], atol=1e-6)
        np.testing.assert_allclose(got.welfare, want["score"], atol=1e-6)


def _comparable(records, variant):
    """Lines with a reward, a P on its scale, and no cell so near a threshold that float32 decides it."""
    chosen, readings, matrices = [], [], []
    for record in records:
        if variant == reward.FRONTIER and record["task"] in reward.OUT_OF_DOMAIN:
            continue  # the published code keeps another form of L there
        try:
            reading = score.read_line(record, variant)
        except score.PublishedError:
            continue
        payoff = chain.read_chain(record["completion"]).payoff
        if not reading.measures["due"] or not 0 <= reading.measures["frontier"] <= 1:
            continue
        cells = [[payoff[key]["LLM"], payoff[key]["user"]] for key in KEYS]
        if not all(abs(number) < 1e6 for cell in cells for number in cell):
            continue
        matrix = np.array(cells, np.float64)
        if not _on_threshold(matrix):
            chosen.append(record)
            readings.append(reading)
            matrices.append(matrix)
    assert len(chosen) > 200
    return chosen, readings, matrices


def _on_threshold(matrix) -> bool:
    gap = np.abs(matrix[:, 0] - matrix[:, 1])
    ratio = gap / np.maximum(np.abs(matrix).max(axis=1), 1e-8)
    return bool((np.abs(ratio - 0.1) < 1e-6).any() or ((gap > 0) & (gap < 1e-6)).any())


def _features(m, matrices, tasks) -> Features:
    """Cells in any order will do: M is a sum over them."""
    f32 = lambda x: np.asarray(x, np.float32)
    columns = {
        "valid": np.ones(len(tasks), bool),
        "answer_user": f32(m.answer_user),
        "answer_llm": f32(m.answer_llm),
        "payoff": f32(matrices).reshape(-1, 2, 3, 2),
        "frontier": f32(m.frontier),
        "reasoning_chars": f32(m.reasoning_chars),
        "response_words": f32(m.response_words),
        "total_words": f32(m.total_words),
        "source": np.array([list(TASKS).index(task) for task in tasks], np.int32),
        "format_ok": m.format_ok,
    }
    flags = {field.name: m.due for field in dataclasses.fields(Features) if field.name not in columns}
    return Features(**columns, **flags)  # the other flags say which blocks are there


# The published behaviour as one expression, against which the linear reading is checked on short texts.
_EXPRESSION = re.compile(
    r"^<thinking>.*?</thinking>\s*<payoff>.*?</payoff>\s*<analyze>.*?</analyze>\s*<response>.*?</response>$",
    re.DOTALL | re.MULTILINE,
)
_PIECES = [
    f"<{slash}{name}>" for name in ("thinking", "payoff", "analyze", "response") for slash in ("", "/")
]
_WELL_FORMED = "<thinking>a</thinking><payoff></payoff>\n<analyze></analyze><response>b</response>"


@given(
    st.lists(st.sampled_from([*_PIECES, " ", "\n", "x", _WELL_FORMED, "\u2028"]), max_size=14).map("".join)
)
def test_format_and_blocks_equal_the_regular_expressions(text):
    assert chain.matches_format(text) == bool(_EXPRESSION.match(text))
    for name in ("payoff", "response"):
        found = re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
        assert chain.first_block(text, name) == (found and found[1])


@settings(max_examples=40)
@given(st.text(max_size=60), st.sampled_from(["", '{"DQ_AQ": ', "[" * 300, "-" * 9000, '"\\']))
def test_reading_never_raises(text, start):
    chain.read_chain(f"<payoff>{start}{text}</payoff><response>{text}")
    chain.read_payoff(start + text)


@pytest.mark.parametrize(
    "piece",
    [
        "<thinking></thinking><payoff>",
        "</thinking> <payoff></payoff> <analyze>",
        "<response>",
        " ",
        "</response>x",
    ],
)
def test_time_is_linear_in_hostile_text(piece):
    """2 MB of repeated tags: the published expression takes 18 s on 9 KB."""
    text = "<thinking>" + piece * (2_000_000 // len(piece))
    begin = time.perf_counter()
    assert not chain.read_chain(text).format_ok
    score.read_verdict({"task": "ambig_qa", "judge_text": "<abg>" * 200_000})
    assert time.perf_counter() - begin < 5


def test_character_bleu_on_values_known_by_hand():
    assert score.character_bleu("abcdef", "abcdef") == pytest.approx(1)
    assert score.character_bleu("", "abc") == 0
    assert score.character_bleu("xyz", "abc") == 0
    # One of one, then no 2-, 3- and 4-gram at all: each counts as the smallest normal float.
    assert score.character_bleu("a", "ab") == pytest.approx(math.exp(-1) * 2.2250738585072014e-308**0.75)
    # 4 characters of 5 matched: 4/4, 3/3, 2/2, 1/1 with the brevity penalty alone.
    assert score.character_bleu("abcd", "abcde") == pytest.approx(math.exp(1 - 5 / 4))


def test_a_negative_llm_reward_scores_zero_and_a_missing_p_counts_zero_with_the_reason(records):
    line = next(r for r in records if r["task"] == "math" and r["expected"]["ablation"].get("utility"))
    (fields,) = score.score_lines([{**line, "pareto_judge_text": "<po>-30</po>"}], reward.FRONTIER)
    assert fields["score"] == fields["user_reward"] == 0
    assert any("complex" in reason for reason in fields["errors"])
    (fields,) = score.score_lines([{**line, "pareto_judge_text": None}], reward.FRONTIER)
    assert fields["score"] > fields["pareto_score"] == 0
    assert any("pareto_judge_text" in reason for reason in fields["errors"])


def test_variants_the_published_code_lacks_are_refused():
    with pytest.raises(UserError, match=r"--reward=rawlsian: .*cobb_douglas"):
        score.score_lines([], "rawlsian")
