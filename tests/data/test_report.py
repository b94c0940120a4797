"""The data report: hand-made rows, near-duplicates against brute force, the published files."""

import dataclasses
import json
import random

import numpy as np
import pytest

from gtalign_jax.data import duplicates, report, sources
from gtalign_jax.data.item import make_item
from gtalign_jax.rewards.tasks import TASKS

WORDS = [f"w{i}" for i in range(300)]


def item(text, truth="t", turn=0):
    made = make_item([{"role": "user", "content": text}], truth)
    return dataclasses.replace(made, task="math", turn=turn)


def split(items, lengths=None, buckets=(8, 16), action=lambda item: "DA"):
    prompts = [report.Written(length) for length in lengths or [5] * len(items)]
    return report.split_report(items, prompts, buckets, action)


def test_rows_prompts_truths_labels_and_actions_are_counted():
    items = [item("a", "yes###x"), item("b", "no"), item("c", "yes###y"), item("d", " "), item("d", "no")]
    found = split(items, action=lambda item: "CQ" if "no" in item.ground_truth else "DA")
    assert (found["rows"], found["prompts"], found["empty_truths"]) == (5, 4, 1)
    assert found["labels"] == {"yes": 2, "no": 2, "": 1}
    assert found["right_actions"] == {"DA": 3, "CQ": 2}
    many = split([item(str(i), str(i)) for i in range(report.MAX_LABELS + 1)])
    assert many["labels"] == {}


def test_repeated_prompts_are_the_turns_of_a_conversation_or_copies():
    rows = [item("a", turn=1), item("a", turn=3), item("a", turn=5), item("b"), item("b"), item("c")]
    assert split(rows)["repeated"] == {
        "turns": {"prompts": 1, "rows": 3},
        "copies": {"prompts": 1, "rows": 2},
    }


def test_lengths_fall_into_the_smallest_bucket_that_holds_them():
    rows = [dataclasses.replace(item(str(i)), where=f"f:{i}") for i in range(5)]
    found = split(rows, [3, 8, 9, 16, 17])
    assert found["buckets"] == {"8": {"holds": 2, "longer": 3}, "16": {"holds": 2, "longer": 1}}
    assert (
        found["dropped"] == 1
        and found["dropped_rows"] == ["f:4"]
        and found["tokens"] == {"min": 3, "p50": 9, "p95": 17, "max": 17}
    )


def text(rng, count=60):
    return [rng.choice(WORDS) for _ in range(count)]


def changed(rng, words, count):
    words = list(words)
    for place in rng.sample(range(len(words)), count):
        words[place] = "x" + words[place]
    return words


@pytest.mark.parametrize("template", ["", "follow these very long rules of the house and then answer "])
def test_near_duplicates_are_those_of_brute_force(template):
    rng = random.Random(0)
    train = [text(rng) for _ in range(60)]
    test = [changed(rng, train[i], n) for i, n in enumerate([0, 1, 1, 1, 2, 3, 5, 20])] + [text(rng)] * 4
    runs = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in train + test]
    mine, theirs = runs[len(train) :], runs[: len(train)]
    expected = [max(len(a & b) / len(a | b) for b in theirs) >= duplicates.THRESHOLD for a in mine]
    assert sum(expected) >= 3 and not all(expected)
    texts = [[template + " ".join(words) for words in part] for part in (test, train)]
    np.testing.assert_array_equal(duplicates.near_duplicates(*texts), expected)


def test_what_all_texts_share_makes_none_of_them_near():
    shared = " ".join(WORDS)
    train, test = ([f"{shared} {name}{i}" for i in range(20)] for name in ("train", "test"))
    assert not duplicates.near_duplicates(test, train).any()
    assert duplicates.near_duplicates(["How far?"], ["How far?", "How near?"]).all()  # too few to say
    assert not duplicates.near_duplicates(["", "a b"], ["", "c d"]).any()
    assert duplicates.near_duplicates([], ["a"]).shape == (0,)


def test_a_leak_is_counted_once_by_its_first_reason():
    long = " ".join(WORDS[:40])
    train = [dataclasses.replace(item(f"Help. {long}"), intent="asked"), *(item(str(i)) for i in range(12))]
    test = [
        train[1],
        train[1],
        dataclasses.replace(item("in other words"), intent="asked"),
        item(f"Help. {long} now"),
        item("new"),
    ]
    assert report.leak_report(train, test) == {"rows": 2, "prompts": 1, "questions": 1, "near": 1}


def published(shared, task, part):
    return sources.read_split(str(shared / "data" / "gtalign"), [TASKS[task]], part).items


def test_the_published_math_rows_leak_and_its_turns_share_prompts(shared):
    train, test = (published(shared, "math", part) for part in ("train", "test"))
    assert report.leak_report(train, test) == {"rows": 274, "prompts": 262, "questions": 0, "near": 0}
    found = split(train, action=TASKS["math"].right_action)
    assert (found["rows"], found["prompts"], found["empty_truths"]) == (3176, 1816, 4)
    assert found["repeated"]["turns"] == {"prompts": 1022, "rows": 2382}
    assert found["repeated"]["copies"]["prompts"] == 0


def test_the_published_labels_and_copies_are_counted(shared):
    guard = split(published(shared, "wildguard", "train"))
    assert guard["labels"] == {"harmful": 1398, "unharmful": 1302}
    assert guard["repeated"]["copies"] == {"prompts": 68, "rows": 136}
    coqa = split(published(shared, "ambig_coqa", "test"), action=TASKS["ambig_coqa"].right_action)
    assert coqa["labels"] == {"non_ambiguous": 932, "ambiguous": 123}
    assert coqa["right_actions"] == {"DA": 932, "CQ": 123}


def test_a_report_is_strict_json_and_lines():
    found = {
        "source": "x",
        "tokenizer": "y",
        "template": ["adds 'x' where there is no system message"],
        "tasks": {"math": {"splits": {"test": split([item("a"), item("a")])}, "leaks": None}},
        "left_out": {"train": 0, "test": 3},
        "bad": {"rows": 1, "lines": ["f.jsonl:3: truth: missing"]},
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    lines = report.text_report(found).splitlines()
    assert "  test  2 rows, 1 prompts, 0 empty truths" in lines
    assert "  test  1 prompts stand in 2 rows: copies" in lines
    assert lines[-1] == "  f.jsonl:3: truth: missing"
