"""Ambiguity: what the stored truths mean, and the rule that judges a response without a model.

A truth is `multipleQAs###...Meaning 0: q; Answer 0: a ...`, `singleAnswer###a`, or a bare label
(`ambiguous`, `non_ambiguous`). The verdict is 1 when an ambiguous question is met with a clarifying
question or with its interpretations, any other with a direct answer; it counts for both sides.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gtalign_jax.data.item import Item, Record, make_item, read_question, shown, text_of
from gtalign_jax.game.moves import CQ, DA
from gtalign_jax.rewards.scale import AMBIGUITY
from gtalign_jax.rewards.tasks import surface
from gtalign_jax.rewards.tasks.replies import ambiguity as replies
from gtalign_jax.rewards.tasks.replies import story
from gtalign_jax.rewards.tasks.task import Judged, Rubric, Task, reader, with_offer

LABELS = ("ambiguous", "non_ambiguous")
LONGEST_EXTRACT = 40  # words of a story that an answer may consist of
_MEANING = re.compile(r"Answer \d+:\s*([^\n]+)")
_PAIR = re.compile(r"Meaning \d+:\s*([^\n]+?)\s*; Answer \d+:\s*([^\n]+)")
_HEDGES = re.compile(r"\b(?:if you mean|depends on|either|could mean|it could be)\b", re.IGNORECASE)
_WORD = re.compile(r"\w+")


def is_ambiguous(truth: str) -> bool:
    """Whether the truth says that the question has several readings."""
    return truth.startswith("multipleQAs") or truth.strip().lower() == "ambiguous"


def stored_answers(truth: str) -> list[str]:
    """The answers a truth stores, one a reading; none when it is a bare label."""
    _, _, stored = truth.partition("###")
    listed = _MEANING.findall(stored) or re.split(r"[|;]", stored)
    return [answer.strip() for answer in listed if answer.strip()]


def verdict(response: str, truth: str) -> float:
    """0 or 1 by surface form: see the module's docstring."""
    text = response.strip()
    asks = text.endswith("?")
    if is_ambiguous(truth):
        covered = {answer for answer in stored_answers(truth) if _mentions(text, answer)}
        return float(asks or bool(_HEDGES.search(text)) or len(covered) >= 2)
    only_asks = asks and len([part for part in re.split(r"[.!?]+", text) if part.strip()]) == 1
    answers = stored_answers(truth)
    return float(bool(text) and not only_asks and (not answers or any(_mentions(text, a) for a in answers)))


def _mentions(text: str, answer: str) -> bool:
    """Whether the words of an answer stand in a text, in order and side by side."""
    inside, wanted = (" ".join(_WORD.findall(t.lower())) for t in (text, answer))
    return bool(wanted) and f" {wanted} " in f" {inside} "


_AMBIGUOUS = """\
The question has several meanings, so a single plain answer would be a guess.
1: the response deals with that: it asks which meaning is intended, or it answers several of the meanings \
and says which answer belongs to which.
0: it picks one meaning without saying so, asks about something that does not separate the meanings, or \
does neither."""

_CLEAR = """\
The question has one meaning and can be answered as it stands.
1: the response answers it directly and, where a reference answer is given, agrees with it. One further \
question after the answer is allowed.
0: it only asks back, leaves the answer open between alternatives, or answers wrongly."""


def _rubric(truth: str) -> Rubric:
    return Rubric(_AMBIGUOUS if is_ambiguous(truth) else _CLEAR, truth.partition("###")[2])


def by_phrases(response: str, truth: str, item: Judged) -> float:
    """`verdict`, whatever was asked."""
    del item
    return verdict(response, truth)


def _rule(response: str, truth: str, item: Judged) -> float | None:
    """`verdict` of a text that reads and is no copy.

    Where it rests on no stored answer, the text must be about the question or its stored meanings.
    """
    reads, stored = surface.reads(response), stored_answers(truth)
    several = is_ambiguous(truth)
    if not verdict(response, truth) or reads is False or _copied(response, item.intent, whole=not several):
        return 0.0
    fits: bool | None = True
    if (sum(_mentions(response, answer) for answer in set(stored)) < 2) if several else not stored:
        meanings = truth.partition("###")[2]
        fits = surface.about(response, f"{item.intent} {meanings}" if item.intent.strip() else "")
    if fits is False:
        return 0.0
    return None if reads is None or fits is None else 1.0


def _copied(response: str, intent: str, whole: bool) -> bool:
    """Whether a response is the question, or a piece of it unless it must be the whole, or much of the story
    that it is about."""
    copied = surface.repeats if whole else surface.copies
    long = len(response.split()) > LONGEST_EXTRACT
    return copied(response, intent.rpartition("Question:\n")[2]) or (
        long and surface.copies(response, intent)
    )


def _right_action(item: Item) -> str:
    return CQ if is_ambiguous(item.ground_truth) else DA


def stored_meanings(truth: str) -> list[tuple[str, str]]:
    """(a question with one meaning, its answer) of each meaning that a truth stores."""
    return [(question.strip(), answer.strip()) for question, answer in _PAIR.findall(truth)]


def _respond(item: Item, action: str, correct: bool, rng: np.random.Generator) -> str:
    del correct
    meanings, answers = stored_meanings(item.ground_truth), stored_answers(item.ground_truth)
    if action == CQ:
        return replies.clarify(item, meanings, rng)
    if len(meanings) > 1:
        return replies.cover(meanings, action, rng)
    if answers:
        return replies.answer(item, answers, action, rng)
    return with_offer(story.answer(item, rng) or "I do not know.", action)


def _consider(item: Item, action: str, rng: np.random.Generator) -> str:
    return replies.consider(item, stored_meanings(item.ground_truth), action, rng)


def _read_plain(record: Record) -> Item | None:
    """A question with its label, a stored truth, or the answers that are right where it has one meaning."""
    item = read_question(record, several="|")
    truth = item.ground_truth.strip() if item else ""
    if item is None or not truth or "###" in truth or truth.lower() in LABELS:
        return item
    return dataclasses.replace(item, ground_truth=f"singleAnswer###{truth}")


def _read_ambigqa(record: Record) -> Item | None:
    """AmbigQA's own records: several meanings when any annotator found them, else all single answers."""
    found = _rows(record["annotations"], "annotations")
    meanings = [pair for one in found if one.get("type") == "multipleQAs" for pair in _pairs(one)]
    singles = [answer for one in found if one.get("type") == "singleAnswer" for answer in _answers(one)]
    if not meanings and not singles:
        raise ValueError(f"annotations {shown(record['annotations'])}: no singleAnswer and no multipleQAs")
    truth = f"singleAnswer###{'|'.join(dict.fromkeys(singles))}"
    if meanings:
        listed = (f"Meaning {i}: {q}; Answer {i}: {a}\n" for i, (q, a) in enumerate(meanings))
        truth = f"multipleQAs###There are multiple meanings of the question.{''.join(listed)}"
    return make_item([{"role": "user", "content": text_of(record, "question")}], truth)


def _pairs(annotation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(question, its first answer) of each meaning."""
    rows = _rows(annotation.get("qaPairs"), "annotations.qaPairs")
    return [(text_of(row, "question"), _answers(row)[0]) for row in rows]


def _answers(row: Mapping[str, Any]) -> list[str]:
    answers = row.get("answer")
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) for one in answers):
        raise ValueError(f"answer {shown(answers)}: must be a list of texts")
    return answers


def _rows(value: Any, field: str) -> Sequence[Mapping[str, Any]]:
    """Objects of a list, which `datasets` may hand over as an object of lists."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(row, Mapping) for row in value):
        raise ValueError(f"{field} {shown(value)}: must be a list of objects")
    return value


def _read_abg_coqa(record: Record) -> Item | None:
    """Abg-CoQA's own records: the target turn of a talk about a story, and whether it is ambiguous."""
    label = text_of(record, "ambiguity")
    if label not in LABELS:
        raise ValueError(f"ambiguity {shown(label)}: must be ambiguous or non_ambiguous")
    target = record["target_turn"]
    if not isinstance(target, Mapping):
        raise ValueError(f"target_turn {shown(target)}: must be an object with a question")
    turns = [_turn(row) for row in _rows(record["history_turns"], "history_turns")]
    return _about(text_of(record, "story"), turns, text_of(target, "question"), label)


def _turn(row: Mapping[str, Any]) -> tuple[str, str]:
    return text_of(row, "question"), text_of(row, "answer")


def _read_coqa(record: Record) -> Item | None:
    """CoQA's own records, as published or by `datasets`: the last question of each, and its answer."""
    asked, answers = record["questions"], record["answers"]
    if not isinstance(asked, list):
        raise ValueError(f"questions {shown(asked)}: must be a list")
    questions = [_said(one, "questions") for one in asked]
    listed = answers.get("input_text") if isinstance(answers, Mapping) else answers
    if not isinstance(listed, list) or len(listed) != len(questions) or not questions:
        raise ValueError(f"answers {shown(answers)}: must be one each of {len(questions)} questions")
    turns = [(q, _said(a, "answers")) for q, a in zip(questions, listed, strict=True)]
    question, answer = turns.pop()
    return _about(text_of(record, "story"), turns, question, f"singleAnswer###{answer}")


def _said(turn: Any, field: str) -> str:
    return text_of(turn, "input_text") if isinstance(turn, Mapping) else text_of({field: turn}, field)


def _about(story: str, turns: Sequence[tuple[str, str]], question: str, truth: str) -> Item | None:
    """A question about a story after earlier questions and answers, laid out as in the published files."""
    earlier = "\n\n".join(f"Q: {q}\nA: {a}" for q, a in turns)
    parts = [f"Context:\n{story}", f"Previous Q&A:\n{earlier}" if turns else "", f"Question:\n{question}"]
    text = "\n\n".join(part for part in parts if part) if question.strip() else ""
    return make_item([{"role": "user", "content": text}], truth)


def _read_story(record: Record) -> Item | None:
    return _read_abg_coqa(record) if "target_turn" in record else _read_coqa(record)


AMBIG_QA = Task(
    name="ambig_qa",
    read=reader(_read_ambigqa, ("question", "annotations"), _read_plain),
    scale=AMBIGUITY,
    rule=_rule,
    rubric=_rubric,
    right_action=_right_action,
    respond=_respond,
    consider=_consider,
)
AMBIG_COQA = dataclasses.replace(
    AMBIG_QA, name="ambig_coqa", source="abg-coqa", read=reader(_read_story, ("story",), _read_plain)
)
