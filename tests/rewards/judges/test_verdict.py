"""Reading verdicts: the forms judges write, the scales, the published readings and hostile text."""

import json
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gtalign_jax.errors import UserError
from gtalign_jax.rewards.judges.verdict import (
    CONSISTENCY,
    NO_VERDICT,
    UNFINISHED,
    read_on_scale,
    read_verdict,
)
from gtalign_jax.rewards.tasks import TASKS

LEVELS = {
    "math": {0, 1},
    "minerva_math": {0, 1},
    "ambig_qa": {0, 1},
    "ambig_coqa": {0, 1},
    "medium": {0, 1, 2, 3, 4},
    "wildguard": {0, 0.5, 1},
    "advbench": {0, 0.5, 1},
}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (r"\boxed{1}", 1),
        (r"\boxed{ 1 }", 1),
        (r"\boxed{1.0}", 1),
        (r"\boxed{1.}", 1),
        (r"\boxed{.5}", 0.5),
        (r"\boxed{0.5}", 0.5),
        (r"\boxed{5e-1}", 0.5),
        (r"\boxed {0.50}", 0.5),
        ("\\boxed{1\n}", 1),
        (r"\boxed{\text{1}}", 1),
        (r"\boxed{\mathbf{0}}", 0),
        (r"$\boxed{1}$.", 1),
        (r"$$\boxed{$1$}$$", None),
        (r"\\boxed{1}", 1),
        (r"\boxed{+0.5}", 0.5),
        (r"\boxed{-0.0}", 0),
        (r"\boxed{01}", 1),
        (r"\boxed{0} no, rather \boxed{1}", 1),
        (r"\boxed{\boxed{1}}", 1),
        (r"The box \boxed{1} fits, so I say \boxed{0.5}, finally.", 0.5),
        (r"<think>perhaps \boxed{0}</think>\boxed{1}", 1),
        (r"perhaps \boxed{0}</think>" + "\n\n" + r"\boxed{1}", 1),
        (r"<think>a</think>x<think>\boxed{0}</think> so \boxed{0.5}", 0.5),
        (r"<THINKING>\boxed{0}</THINKING>\boxed{1}", 1),
    ],
)
def test_forms_of_a_verdict(text, score):
    assert read_verdict(text, "wildguard").score == score


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", NO_VERDICT),
        ("no verdict", NO_VERDICT),
        ("boxed{1}", NO_VERDICT),
        ("<abg>1</abg>", NO_VERDICT),
        (r"<think>\boxed{1}</think>", NO_VERDICT),
        (r"\boxed{1}</think> hm", NO_VERDICT),
        (r"<think>surely \boxed{1}", UNFINISHED),
        (r"<think>a</think><think>\boxed{1}", UNFINISHED),
        (r"\boxed{yes}", "the judge's verdict 'yes}' is not a number"),
        (r"\boxed{}", "the judge's verdict '}' is not a number"),
        (r"\boxed{1} or \boxed{", "the judge's verdict '' is not a number"),
        (r"\boxed{1", "the judge's verdict '1' is not a number"),
        (r"\boxed{1/2}", "the judge's verdict '1/2}' is not a number"),
        (r"\boxed{1_0}", "the judge's verdict '1_0}' is not a number"),
        (r"\boxed{nan}", "the judge's verdict 'nan}' is not a number"),
        (r"\boxed{١}", "the judge's verdict '١}' is not a number"),
        (r"\boxed{7}", "the judge's verdict 7 is outside the scale 0, 0.5, 1"),
        (r"\boxed{-1}", "the judge's verdict -1 is outside the scale 0, 0.5, 1"),
        (r"\boxed{1e-9}", "the judge's verdict 1e-09 is outside the scale 0, 0.5, 1"),
        (r"\boxed{1e400}", "the judge's verdict inf is outside the scale 0, 0.5, 1"),
        (r"\boxed{1} but \boxed{7}", "the judge's verdict 7 is outside the scale 0, 0.5, 1"),
    ],
)
def test_a_verdict_that_cannot_be_read_is_missing_with_the_reason(text, reason):
    verdict = read_verdict(text, "wildguard")
    assert (verdict.score, verdict.reason) == (None, reason)


@pytest.mark.parametrize("task", sorted(LEVELS))
@pytest.mark.parametrize("value", [-1, -0.5, 0, 0.25, 0.5, 1, 2, 3, 4, 4.5, 5, 100])
def test_each_task_has_its_scale(task, value):
    verdict = read_verdict(rf"So \boxed{{{value}}}", task)
    allowed = value in LEVELS[task] or (task == "medium" and 0 <= value <= 4)
    assert verdict.score == (value if allowed else None)


def test_scales_cover_every_task_of_the_reward():
    assert {name: set(task.scale.levels) for name, task in TASKS.items()} == LEVELS


def test_an_unknown_task_is_one_line():
    with pytest.raises(UserError, match=r"task 'maths' has no judge; known: math, .*advbench$"):
        read_verdict(r"\boxed{1}", "maths")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<po> 1 </po>", 1),
        ("<PO>0.5</PO>", 0.5),
        ("<po>0</po><po>1</po>", 1),
        (r"<po>0</po> or rather \boxed{0.5}", 0.5),
        (r"<think><po>1</po></think>\boxed{0}", 0),
        ("<po>100</po>", None),
        ("<po>-0.5</po>", None),
        ("<po>x</po>", None),
        ("<po>inf</po>", None),
        ("1", None),
        ("none", None),
    ],
)
def test_consistency(text, score):
    assert read_on_scale(text, CONSISTENCY).score == score


def test_clean_recorded_verdicts_read_as_the_published_code_reads_them(shared):
    """Where the recorded text holds one plain verdict on the scale, our reading is the published score."""
    plain = re.compile(r"(?:thought: \w+\n)?\$?(?:\\boxed\{[\d.+-]+\}|<abg>\s*[\d]\s*</abg>)\$?")
    compared = 0
    for name in ("reward_golden.jsonl", "reward_edge_golden.jsonl"):
        for line in (shared / "golden" / name).read_text().rstrip("\n").split("\n"):
            record = json.loads(line)
            fields = record["expected"].get("cobb_douglas", {})
            if record["task"] not in ("math", "ambig_qa", "wildguard") or not fields.get("utility"):
                continue
            ours = read_verdict(record["judge_text"], record["task"])
            if not plain.fullmatch(record["judge_text"]) or ours.score is None:
                continue
            # Their reader knows neither spaces nor a trailing or leading point; those read as 0 there.
            if re.search(r"\{\s|\{\.|\.\}|\{1\.0\}", record["judge_text"]):
                continue
            assert ours.score == fields["answer_reward"], record["judge_text"]
            compared += 1
    assert compared > 100


def test_off_scale_recorded_verdicts_are_missing_not_clamped(shared):
    texts = set()
    for name in ("reward_golden.jsonl", "reward_edge_golden.jsonl"):
        for line in (shared / "golden" / name).read_text().rstrip("\n").split("\n"):
            texts.add(json.loads(line)["judge_text"])
    off = {text for text in texts if re.fullmatch(r"\\boxed\{(?:-?[2-9]|-1|12|1e400|1e-9)\}", text)}
    assert len(off) > 5
    assert all(read_verdict(text, "math").score is None for text in off)


FRAGMENTS = [
    *(r"\boxed{", r"\text{", "{", "}", "1", "0.5", "7", " ", "\n", "x"),
    *("<think>", "</think>", "<abg>", "</abg>"),
]


@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=30).map("".join))
@example("\\boxed{1}\ud800")
def test_any_text_gives_a_level_or_a_reason(text):
    for task, levels in LEVELS.items():
        verdict = read_verdict(text, task)
        if verdict.score is None:
            assert verdict.reason
        else:
            assert verdict.score in levels or task == "medium" and 0 <= verdict.score <= 4
    assert read_on_scale(text, CONSISTENCY).score in {None, *CONSISTENCY.levels}


@pytest.mark.parametrize(
    "unit",
    [r"\boxed{", r"\boxed{{", "<think>", "</think>", r"\boxed {1", "1" * 7, r"\boxed{\text{"],
)
def test_reading_takes_linear_time(unit):
    started = time.thread_time()  # what others take does not count
    read_verdict(unit * 40_000, "ambig_qa")
    assert time.thread_time() - started < 1.0
