"""What was said before a question: as turns or quoted, and cut, but never the instruction or the question."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtalign_jax.data import sources
from gtalign_jax.data.config import DataConfig
from gtalign_jax.data.history import flattened, instructed, prompt_tokens, published_turns, shortened
from gtalign_jax.data.item import Item
from gtalign_jax.errors import UserError
from gtalign_jax.rewards.tasks import EMBEDDED, TASKS

SYSTEM = {"role": "system", "content": "Play."}


def turn(role, content):
    return {"role": role, "content": content}


TALK = (turn("user", "one"), turn("assistant", "two"), turn("user", "three"), turn("assistant", "four"))
ASKED = (SYSTEM, *TALK, turn("user", "five?"))


def item_of(messages):
    return Item(0, tuple(messages), "s", "t", "", "", where="q.jsonl:7")


def encode(messages):
    return [c for m in messages for c in m["content"].encode()]


def written(tokens):
    return bytes(tokens).decode()


def test_a_flat_history_is_quoted_before_the_question():
    system, asked = flattened(ASKED)
    assert system == SYSTEM and asked["role"] == "user"
    assert asked["content"] == (
        "What was said before:\n\nUser: one\n\nAssistant: two\n\nUser: three\n\nAssistant: four\n\n"
        "The user now says:\n\nfive?"
    )
    for alone in (ASKED[-1:], (SYSTEM, ASKED[-1])):
        assert flattened(alone) == alone


def test_the_oldest_turns_go_first_and_whole():
    assert list(shortened(ASKED)) == [(SYSTEM, *TALK[2:], ASKED[-1]), (SYSTEM, ASKED[-1])]
    assert list(shortened(ASKED[-1:])) == []
    twice = (turn("user", "a"), turn("user", "b"), turn("assistant", "c"), turn("user", "d"))
    assert list(shortened(twice)) == [twice[1:], twice[3:]]


@pytest.mark.parametrize(
    ("history", "too_long", "room", "expected", "cut"),
    [
        ("given", "drop", 99, "Play.onetwothreefourfive?", False),
        ("given", "drop", 20, "Play.onetwothreefourfive?", False),
        ("given", "cut", 20, "Play.threefourfive?", True),
        ("turns", "cut", 10, "Play.five?", True),
        ("turns", "cut", 9, "Play.onetwothreefourfive?", False),
        ("flat", "cut", 10, "Play.five?", True),
        ("flat", "cut", 84, "Play.What was said before:\n\nUser: three\n\nAssistant: four", True),
    ],
)
def test_a_history_is_cut_only_as_far_as_it_must_be(history, too_long, room, expected, cut):
    tokens, was_cut = prompt_tokens(
        item_of(ASKED), encode, lambda tokens: len(tokens) <= room, history, too_long
    )
    assert written(tokens).startswith(expected) and was_cut == cut


roles = st.lists(st.sampled_from(["user", "assistant"]), max_size=6)


@given(roles, st.booleans(), st.sampled_from(["turns", "flat"]), st.integers(0, 200))
def test_the_instruction_and_the_question_stay_whatever_is_cut(said, under, history, room):
    turns = [turn(role, f"<{i}>") for i, role in enumerate(said)] + [turn("user", "why?")]
    messages = ([SYSTEM] if under else []) + turns
    tokens, cut = prompt_tokens(item_of(messages), encode, lambda tokens: len(tokens) <= room, history, "cut")
    text = written(tokens)
    assert text.endswith("why?") and text.startswith("Play.") == under
    kept = [int(i) for i in re.findall(r"<(\d)>", text)]
    assert kept == list(range(len(said)))[len(said) - len(kept) :]  # the newest, without a gap
    assert cut == (len(kept) < len(said)) and not (cut and len(tokens) > room)
    if cut and kept:
        assert said[kept[0]] == "user"


def test_a_row_that_the_template_refuses_is_named():
    def refuse(messages):
        raise UserError("the chat template refuses these messages (roles)")

    with pytest.raises(UserError, match="^q.jsonl:7: the chat template refuses .*config.data.history=flat"):
        prompt_tokens(item_of(ASKED), refuse, lambda tokens: True)


def test_an_instruction_stands_before_what_has_none():
    assert instructed(TALK, "Play.") == (SYSTEM, *TALK) and instructed(TALK, "") == TALK
    assert instructed(ASKED, "Other.") == ASKED


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"chat_history": [{"content": "x"}]}, r"extra_info.chat_history\[0\] .*must have a role"),
        ({"chat_history": "x"}, "extra_info.chat_history 'x': must be a list of messages"),
        ({"chat_history": [turn("assistant", "x")]}, "extra_info.chat_history: must end with the user's"),
        ({"single_turn_prompt": 3}, "extra_info.single_turn_prompt 3: must be text"),
        (None, "extra_info.single_turn_prompt None: must be text"),
    ],
)
def test_a_published_row_without_a_conversation_is_refused(extra, message):
    with pytest.raises(ValueError, match=message):
        published_turns({"extra_info": extra})


def test_published_rows_become_conversations_under_our_instruction(shared):
    config = DataConfig(
        source="gtalign",
        root=str(shared / "data" / "gtalign"),
        tasks=("math", "ambig_coqa"),
        instruction="Play.",
        train_per_task=0,
        test_per_task=0,
    )
    tasks = {name: TASKS[name] for name in config.tasks}
    given, turns = (
        sources.load_items(dataclasses.replace(config, history=history), tasks, "test")
        for history in ("given", "turns")
    )
    assert len(given) == len(turns) and [i.seen for i in given] == [i.seen for i in turns]
    assert sum(len(i.messages) > 2 for i in turns if i.task == "math") == 282
    for file, ours in zip(given, turns, strict=True):
        assert ours.messages[0] == SYSTEM and dataclasses.replace(file, messages=ours.messages) == ours
        assert file.messages[-1]["content"].endswith("Question: " + ours.messages[-1]["content"])


def test_the_embedded_tasks_take_another_instruction():
    tasks = {"math": EMBEDDED["math"]}
    config = DataConfig(tasks=("math",), train_per_task=3)
    short, plain = (
        sources.load_items(dataclasses.replace(config, instruction=name), tasks, "train")
        for name in ("short", "plain")
    )
    for before, after in zip(short, plain, strict=True):
        assert before.messages[1:] == after.messages[1:] and "clarifying" in after.messages[0]["content"]


@pytest.mark.parametrize("field", ["history", "too_long"])
def test_a_choice_that_there_is_not_names_those_there_are(field):
    with pytest.raises(ValueError, match=f"^{field}='x': must be one of"):
        DataConfig(**{field: "x"})
