"""Records in the schemas the public data sets have, small files with malformed rows among them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gtalign_jax.data import sources
from gtalign_jax.data.config import DataConfig
from gtalign_jax.errors import UserError
from gtalign_jax.rewards.tasks import TASKS, ambiguity

MEANINGS = [
    {"question": "Who owns it since 1970?", "answer": ["the public", "shareholders"]},
    {"question": "Who owns it now?", "answer": ["FBN Holdings"]},
]
TALK = [{"role": "user", "content": "Help me write."}, {"role": "assistant", "content": "On what?"}]
TURNS = [{"turn_id": 1, "question": "Is it hot?", "answer": "yes"}]

# task → (a record of its public data set, question, truth)
RECORDS = {
    "math": (
        {
            "problem": "1+1?",
            "level": "Level 5",
            "type": "Algebra",
            "solution": r"So \boxed{1} no: \boxed{2}.",
        },
        "1+1?",
        "2",
    ),
    "minerva_math": (
        {"problem": "How far?", "type": "Physics", "solution": r"It is \boxed{1.6}", "idx": 0},
        "How far?",
        "1.6",
    ),
    "medium": (
        {
            "prompt": [*TALK, {"role": "user", "content": "On tea."}],
            "single_turn_prompt": "Write about tea.",
            "single_turn_completion": "Tea is good.",
            "conv_id": 3,
        },
        "On tea.",
        "Tea is good.",
    ),
    "wildguard": (
        {
            "prompt": "How do I bake?",
            "adversarial": False,
            "response": None,
            "prompt_harm_label": "unharmful",
        },
        "How do I bake?",
        "unharmful",
    ),
    "advbench": (
        {"goal": "Write a script that harms", "target": "Sure, here is a script"},
        "Write a script that harms",
        "Sure, here is a script",
    ),
    "ambig_qa": (
        {
            "id": "1",
            "question": "Who owns it?",
            "annotations": [{"type": "singleAnswer", "answer": ["FBN", "F"]}],
        },
        "Who owns it?",
        "singleAnswer###FBN|F",
    ),
    "ambig_coqa": (
        {
            "id": "s",
            "story": "A bulb glows.",
            "history_turns": TURNS,
            "target_turn": {"turn_id": 2, "question": "Why?", "answer": "current"},
            "ambiguity": "ambiguous",
        },
        "Context:\nA bulb glows.\n\nPrevious Q&A:\nQ: Is it hot?\nA: yes\n\nQuestion:\nWhy?",
        "ambiguous",
    ),
}

# task → (a truth in a record of one's own, what it is kept as), where that is not the same text
PLAIN = {
    "wildguard": ("harmful", "harmful"),
    "ambig_qa": ("Paris", "singleAnswer###Paris"),
    "ambig_coqa": ("non_ambiguous", "non_ambiguous"),
}


def load(tmp_path, task, *records):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return read(f"jsonl:{tmp_path}", task)


def read(source, task):
    config = DataConfig(source=source, tasks=(task,), train_per_task=0)
    return sources.load_items(config, {task: TASKS[task]}, "train")


@pytest.mark.parametrize("task", RECORDS)
def test_a_public_record_is_read(tmp_path, task):
    record, question, truth = RECORDS[task]
    (item,) = load(tmp_path, task, record)
    assert (item.messages[-1]["content"], item.ground_truth) == (question, truth)
    assert (item.task, item.source) == (task, TASKS[task].source)
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "train.parquet")
    assert read(f"parquet:{tmp_path}", task) == [item]


def test_the_published_rows_and_plain_questions_are_read_by_the_same_tasks(tmp_path):
    for task in RECORDS:
        given, truth = PLAIN.get(task, ("t", "t"))
        (item,) = load(tmp_path, task, {"question": "q?", "truth": given})
        assert (item.messages[-1]["content"], item.ground_truth, item.task) == ("q?", truth, task)


def test_a_medium_article_keeps_its_conversation_and_its_request(tmp_path):
    record, _, _ = RECORDS["medium"]
    (item,) = load(tmp_path, "medium", record)
    assert [m["content"] for m in item.messages[1:]] == ["Help me write.", "On what?", "On tea."]
    assert item.intent == "Write about tea."
    alone = {name: value for name, value in record.items() if name != "prompt"}
    assert load(tmp_path, "medium", alone)[0].messages[-1]["content"] == "Write about tea."


@pytest.mark.parametrize("columns", [False, True])
def test_several_meanings_are_kept_as_lists_of_objects_or_objects_of_lists(tmp_path, columns):
    annotation = {"type": "multipleQAs", "answer": [], "qaPairs": MEANINGS}
    annotations = [annotation, {"type": "singleAnswer", "answer": ["x"], "qaPairs": []}]
    if columns:
        pairs = {name: [row[name] for row in MEANINGS] for name in ("question", "answer")}
        annotations = {"type": ["multipleQAs"], "answer": [[]], "qaPairs": [pairs]}
    (item,) = load(tmp_path, "ambig_qa", {"question": "Who?", "annotations": annotations})
    assert ambiguity.is_ambiguous(item.ground_truth)
    assert ambiguity.stored_answers(item.ground_truth) == ["the public", "FBN Holdings"]


@pytest.mark.parametrize(
    "answers", [[{"input_text": "red"}, {"input_text": "big"}], {"input_text": ["red", "big"]}]
)
def test_a_coqa_conversation_asks_its_last_question(tmp_path, answers):
    questions = (
        [{"input_text": "Colour?"}, {"input_text": "Size?"}]
        if isinstance(answers, list)
        else ["Colour?", "Size?"]
    )
    (item,) = load(tmp_path, "ambig_coqa", {"story": "A ball.", "questions": questions, "answers": answers})
    assert item.intent == "Context:\nA ball.\n\nPrevious Q&A:\nQ: Colour?\nA: red\n\nQuestion:\nSize?"
    assert item.ground_truth == "singleAnswer###big"


def test_what_the_paper_does_not_use_is_left_out(tmp_path, caplog):
    easy, guard = RECORDS["math"][0] | {"level": "Level 4"}, RECORDS["wildguard"][0]
    assert len(load(tmp_path, "math", easy, RECORDS["math"][0], easy)) == 1
    assert "2 records of train are not for their task or empty, and left out" in caplog.text
    attacked, unlabelled = guard | {"adversarial": True}, guard | {"prompt_harm_label": None}
    assert len(load(tmp_path, "wildguard", attacked, unlabelled, guard)) == 1


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("math", {"solution": "It is 2."}, r"solution: holds no \boxed{...} that closes"),
        ("math", {"problem": None}, "problem None: must be text"),
        ("math", {"level": 5}, "level 5: must be text"),
        ("minerva_math", {"solution": r"\boxed{1"}, r"solution: holds no \boxed{...} that closes"),
        ("medium", {"single_turn_completion": 4}, "single_turn_completion 4: must be text"),
        ("medium", {"prompt": TALK}, "messages: the last one is the assistant's"),
        (
            "wildguard",
            {"prompt_harm_label": "bad"},
            "prompt_harm_label 'bad': must be harmful or unharmful",
        ),
        ("wildguard", {"prompt": 3}, "prompt 3: must be text"),
        ("advbench", {"target": None}, "target None: must be text"),
        ("ambig_qa", {"annotations": []}, "annotations []: no singleAnswer and no multipleQAs"),
        ("ambig_qa", {"annotations": "x"}, "annotations 'x': must be a list of objects"),
        (
            "ambig_qa",
            {"annotations": [{"type": "singleAnswer", "answer": "x"}]},
            "answer 'x': must be a list",
        ),
        (
            "ambig_qa",
            {"annotations": [{"type": "multipleQAs", "qaPairs": [3]}]},
            "annotations.qaPairs [3]: must be",
        ),
        ("ambig_coqa", {"ambiguity": "maybe"}, "ambiguity 'maybe': must be ambiguous or non_ambiguous"),
        ("ambig_coqa", {"target_turn": "Why?"}, "target_turn 'Why?': must be an object with a question"),
        ("ambig_coqa", {"history_turns": [{"question": "x"}]}, "answer None: must be text"),
        ("ambig_coqa", {"history_turns": None}, "history_turns None: must be a list of objects"),
    ],
)
def test_a_malformed_public_record_names_file_row_and_field(tmp_path, task, change, message):
    good = RECORDS[task][0]
    with pytest.raises(UserError) as error:
        load(tmp_path, task, good, good | change)
    assert str(error.value).startswith(f"{tmp_path / 'train.jsonl'}:2: ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": [{"input_text": "red"}]}, "must be one each of 2 questions"),
        ({"answers": None}, "answers None: must be one each"),
        ({"questions": [{"input_text": 1}, "b"]}, "input_text 1: must be text"),
        ({"questions": None}, "questions None: must be a list"),
        ({"story": 1}, "story 1: must be text"),
    ],
)
def test_a_malformed_coqa_record_names_file_row_and_field(tmp_path, change, message):
    good = {"story": "A ball.", "questions": ["a?", "b?"], "answers": {"input_text": ["a", "b"]}}
    with pytest.raises(UserError) as error:
        load(tmp_path, "ambig_coqa", good | change)
    assert "train.jsonl:1: " in str(error.value) and message in str(error.value)


def test_a_request_of_ones_own_has_one_of_the_labels(tmp_path):
    with pytest.raises(UserError, match=r"train.jsonl:1: truth 'harmfull': must be harmful or unharmful"):
        load(tmp_path, "wildguard", {"question": "Why?", "truth": "harmfull"})
    assert load(tmp_path, "advbench", {"question": "Why?"})  # all are harmful: no truth is needed


def test_a_list_of_answers_counts_where_it_is_said_how(tmp_path):
    (item,) = load(tmp_path, "ambig_qa", {"question": "Who?", "truth": ["Ann", "Anna"]})
    assert ambiguity.stored_answers(item.ground_truth) == ["Ann", "Anna"]
    assert ambiguity.verdict("It was Anna.", item.ground_truth) == 1.0
    assert ambiguity.verdict("It was Bob.", item.ground_truth) == 0.0
    with pytest.raises(UserError, match=r"train.jsonl:1: truth \['1', '2'\]: must be one text or number"):
        load(tmp_path, "medium", {"question": "Which?", "truth": ["1", "2"]})
