"""A user's own questions, from files, folders and hub data sets; what is wrong names file, row and field."""

import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gtalign_jax.chain.prompt import INSTRUCTION, SHORT_INSTRUCTION
from gtalign_jax.data import sources
from gtalign_jax.data.config import DataConfig, FieldNames
from gtalign_jax.data.item import make_item
from gtalign_jax.errors import UserError
from gtalign_jax.rewards.tasks import TASKS
from gtalign_jax.rewards.tasks.task import Task

OWN = Task(name="own")
OPEN = Task(name="open", needs_truth=False)
RUN = {"own": OWN}


def config_of(source, **fields):
    fields = {"train_per_task": 0, "test_per_task": 0} | fields
    return DataConfig(source=source, tasks=("own",), **fields)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def load(source, split="train", tasks=RUN, **fields):
    return sources.load_items(config_of(source, **fields), tasks, split)


def questions(count, **more):
    return [{"question": f"How many {i}?", "truth": i, "id": f"q{i}", **more} for i in range(count)]


def test_one_file_is_divided_by_its_questions_whatever_else_changes(tmp_path):
    rows = questions(50)
    source = write_lines(tmp_path / "q.jsonl", rows)
    train, test = (load(source, split) for split in ("train", "test"))
    assert sorted(i.name for i in train + test) == sorted(r["id"] for r in rows)
    assert 4 <= len(test) <= 16 and not any(item.seen for item in test)
    assert [item.id for item in train] == list(range(len(train)))
    again = write_lines(tmp_path / "again.jsonl", [r | {"truth": "x", "note": r["id"]} for r in rows[::-1]])
    assert {i.name for i in load(again, "test")} == {i.name for i in test}
    assert len(load(source, "test", test_share=1.0)) == 50


def test_a_record_becomes_an_item_with_the_instruction_before_it(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    asks = {"role": "user", "content": "And c?"}
    rows = [
        {"question": "Why?", "truth": 3},
        {"messages": [*talk, asks], "truth": "t", "intent": "What of c?", "id": 7},
        {"messages": [{"role": "system", "content": "Be kind."}, asks], "truth": ["x", 2]},
    ]
    source = write_lines(tmp_path / "train.jsonl", rows)[: -len("/train.jsonl")]
    first, second, third = load(source)
    system = {"role": "system", "content": SHORT_INSTRUCTION}
    assert first.messages == (system, {"role": "user", "content": "Why?"})
    assert (first.task, first.source, first.ground_truth, first.intent) == ("own", "own", "3", "Why?")
    assert second.messages == (system, *talk, asks)
    assert (second.intent, second.name) == ("What of c?", "7")
    assert third.messages[0]["content"] == "Be kind." and third.ground_truth == "x\n2"
    assert load(source, instruction="full")[0].messages[0]["content"] == INSTRUCTION
    assert load(source, instruction="")[0].messages == first.messages[1:]


def test_fields_may_have_other_names(tmp_path):
    source = write_lines(tmp_path / "q.jsonl", [{"ask": "Why?", "gold": "so", "question": "not this"}])
    (item,) = load(source, test_share=0.0, fields=FieldNames(question="ask", truth="gold"))
    assert (item.intent, item.ground_truth) == ("Why?", "so")
    with pytest.raises(UserError, match=r"q.jsonl:1: why: missing; config.data.fields.question names it"):
        load(source, fields=FieldNames(question="why"))


def test_rows_name_their_task_or_stand_in_its_folder(tmp_path):
    tasks = {"own": OWN, "open": OPEN, "math": TASKS["math"]}
    for folder in tasks:
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "train.jsonl", questions(2))
    write_lines(tmp_path / "train.jsonl", [{"question": "q", "task": "open"}])
    found = sources.load_items(config_of(f"jsonl:{tmp_path}"), tasks, "train")
    assert [i.task for i in found] == ["open", "math", "math", "open", "open", "own", "own"]
    assert {i.task: i.source for i in found} == {"own": "own", "open": "open", "math": "math-hard"}
    limited = config_of(f"jsonl:{tmp_path}", train_per_task=1)
    assert [i.task for i in sources.load_items(limited, tasks, "train")] == ["open", "math", "own"]


def test_parquet_and_json_files_hold_the_same(tmp_path):
    rows = questions(9)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    (tmp_path / "q.json").write_text(json.dumps({"data": rows}), encoding="utf-8-sig")
    lines = load(write_lines(tmp_path / "q.jsonl", rows))
    assert lines == load(f"parquet:{tmp_path / 'q.parquet'}") == load(f"jsonl:{tmp_path / 'q.json'}")


def test_a_data_set_of_the_hub_is_streamed_and_read_no_further_than_asked(tmp_path, monkeypatch):
    rows = questions(9)
    for split in ("train", "validation"):
        write_lines(tmp_path / f"{split}.jsonl", rows)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    asked = []
    whole = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append(k) or whole(*a, **k))
    found = load(f"hub:{tmp_path}", "test", splits=("train", "validation"), test_per_task=4)
    assert [i.name for i in found] == ["q0", "q1", "q2", "q3"] and all(i.seen for i in found)
    assert all(options["streaming"] for options in asked)
    saved = tmp_path / "saved"
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(saved)
    assert [i.name for i in load(f"hub:{saved}")] == [r["id"] for r in rows]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:no/such_set", "config.data.source=hub:no/such_set: split 'train' cannot be read"),
        ("hub:EMPTY/none", "split 'train' cannot be read"),
        (
            "jsonl:EMPTY",
            "holds no train.jsonl or train.json; add it, or name the split in config.data.splits",
        ),
        ("jsonl:gone", "config.data.source: gone: no such file or folder"),
        ("parquet:EMPTY/x.jsonl", "x.jsonl: cannot be read"),
        ("hub:EMPTY/deep/in", "hub:.*: no item in split 'train'"),
        ("jsonl:EMPTY/latin.json", r"latin.json: not UTF-8 \(byte 18\); save the file as UTF-8"),
    ],
)
def test_a_place_that_cannot_be_read_is_one_line(tmp_path, source, message):
    (tmp_path / "x.jsonl").write_text("{}\n")
    (tmp_path / "deep" / "in").mkdir(parents=True)
    (tmp_path / "deep" / "in" / "train.jsonl").write_text("")
    (tmp_path / "latin.json").write_bytes(b'[{"question": "caf\xe9"}]')
    with pytest.raises(UserError, match=message) as error:
        load(source.replace("EMPTY", str(tmp_path)))
    assert "\n" not in str(error.value)


GOOD = b'{"question": "Why?", "truth": "so"}'


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"truth": "so"}, "neither question nor messages: give one of them, or map it"),
        ({"question": 7}, "question 7: must be text"),
        ({"question": ["a"]}, "question ['a']: must be text"),
        ({"question": "Why?"}, "truth: missing or empty, and task 'own' needs one; give it, or map it"),
        ({"question": "Why?", "truth": None}, "truth: missing or empty"),
        ({"question": "Why?", "truth": []}, "truth: missing or empty"),
        ({"question": "Why?", "truth": {"a": 1}}, "truth {'a': 1}: must be one text or number"),
        ({"question": "Why?", "truth": ["a", ["b"]]}, "truth[1] ['b']: must be one text or number"),
        ({"question": "Why?", "truth": "so", "id": 1.5}, "id 1.5: must be a text or a whole number"),
        (
            {"question": "Why?", "truth": "so", "task": "poetry"},
            "task 'poetry': is not one of config.data.tasks",
        ),
        ({"question": "Why?", "truth": "so", "task": ["own"]}, "task ['own']: is not one of"),
        ({"question": "a\ud800b", "truth": "so"}, r"question holds half a surrogate pair (\ud800)"),
        ({"question": "a", "truth": "\udfff"}, r"truth holds half a surrogate pair (\udfff)"),
        ({"messages": "Why?"}, "messages 'Why?': must be a list of objects"),
        ({"messages": []}, "messages []: must be a list of objects"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "messages[0] {'role': 'bot', 'content': 'x'}: role must",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content None: must be text"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last one is the assistant's; end with"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
            "messages[1]: a system message comes first",
        ),
        (b'{"question": "Why?"', "not JSON"),
        (b'{"question": "\xff"}', "not UTF-8 (byte 14); save the file as UTF-8"),
        (b"[1]", "must be a JSON object"),
    ],
)
def test_a_bad_record_names_file_row_and_field(tmp_path, row, message):
    path = tmp_path / "q.jsonl"
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    path.write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(UserError) as error:
        load(f"jsonl:{path}")
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
    assert "\n" not in str(error.value)


HALF = "a\ud800b"
ASKS = [{"role": "user", "content": "q"}]
ROW = {"prompt": ASKS, "data_source": "math-hard", "reward_model": {"ground_truth": "1"}}


@pytest.mark.parametrize(
    ("task", "row", "field"),
    [
        ("math", ROW | {"prompt": [{"role": "user", "content": HALF}]}, r"prompt\[0\].content"),
        ("math", ROW | {"prompt": [{"role": HALF, "content": "q"}, *ASKS]}, r"prompt\[0\].role"),
        ("math", ROW | {"extra_info": {"single_turn_prompt": HALF}}, "intent"),
        ("math", {"question": "q", "truth": 1, "id": HALF}, "id"),
        (
            "ambig_qa",
            {"question": "q", "annotations": [{"type": "singleAnswer", "answer": [HALF]}]},
            "truth",
        ),
    ],
)
def test_half_a_surrogate_pair_is_named_in_every_schema(tmp_path, task, row, field):
    source = write_lines(tmp_path / "q.jsonl", [row])
    with pytest.raises(UserError, match=rf"q.jsonl:1: {field} holds half a surrogate pair \(.ud800\): mend"):
        load(source, tasks={task: TASKS[task]})


@pytest.mark.parametrize("source", ["parquet", "gtalign"])
def test_a_text_of_a_parquet_file_that_is_not_utf_8_names_row_and_field(tmp_path, source):
    """Also behind the first batch that is read."""
    bytes_ = pa.array([b"q"] * 299 + [b"caf\xe9"], pa.binary())
    texts = pa.StringArray.from_buffers(300, *bytes_.buffers()[1:])
    (tmp_path / "math").mkdir()
    path = tmp_path / "math" / "train.parquet"
    pq.write_table(pa.table({"question": ["q"] * 300, "data_source": texts}), path)
    config = DataConfig(source=f"parquet:{path}" if source == "parquet" else source, root=str(tmp_path))
    with pytest.raises(UserError, match=r"train.parquet, row 299: data_source: not UTF-8 \(byte 3\); write"):
        sources.read_source(config, {"math": TASKS["math"]}, "train", 0, keep_going=True)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(
        b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD.replace(b"Why", b"How") + b"\r\n"
    )
    source = f"jsonl:{tmp_path / 'q.jsonl'}"
    assert [i.intent for s in ("train", "test") for i in load(source, s, test_share=1.0 * (s == "test"))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "row 0: 1: must be an object"),
        ('{"rows": []}', "must hold a list of records"),
        ("[", "cannot be read"),
    ],
)
def test_a_json_file_of_another_shape_is_named(tmp_path, text, message):
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(UserError, match=f"q.json.*{message}"):
        load(f"jsonl:{tmp_path / 'q.json'}")


def test_several_tasks_need_a_name_in_each_row(tmp_path):
    source = write_lines(tmp_path / "q.jsonl", questions(1))
    with pytest.raises(UserError, match=r"q.jsonl:1: task: missing; the run has several \(own, open\)"):
        sources.load_items(config_of(source), {"own": OWN, "open": OPEN}, "train")


def test_a_split_without_items_is_named(tmp_path):
    source = write_lines(tmp_path / "q.jsonl", questions(3))
    with pytest.raises(UserError, match=r"config.data.source=jsonl:.*: no item in split 'test'"):
        load(source, "test", test_share=0.0)


def test_what_stands_in_both_splits_is_marked_or_left_out(tmp_path, caplog):
    write_lines(tmp_path / "train.jsonl", questions(6))
    write_lines(tmp_path / "test.jsonl", questions(9)[4:])
    source = f"jsonl:{tmp_path}"
    assert [i.seen for i in load(source, "test")] == [True, True, False, False, False]
    with caplog.at_level(logging.WARNING):
        assert [i.name for i in load(source, decontaminate=True)] == ["q0", "q1", "q2", "q3"]
    assert "2 training rows stand in the test split and are left out" in caplog.text
    assert not any(i.seen for i in load(source, "test", decontaminate=True))


def test_a_reader_of_ones_own_that_meets_another_type_names_the_row(tmp_path):
    source = write_lines(tmp_path / "q.jsonl", [{"text": {"a": 1}}])
    for read, message in [
        (lambda record: record["missing"], "q.jsonl:1: missing: missing"),
        (lambda record: record["text"].strip(), "q.jsonl:1: cannot be read .'dict' object has no"),
    ]:
        with pytest.raises(UserError, match=message):
            load(source, tasks={"own": Task(name="own", read=read)})


def test_all_bad_records_can_be_collected(tmp_path):
    rows = [*questions(2), {"question": 1}, *questions(1), {}]
    source = write_lines(tmp_path / "q.jsonl", rows)
    loaded = sources.read_source(config_of(source, test_share=0.0), RUN, "train", 0, keep_going=True)
    assert len(loaded.items) == 3 and [line.split(": ")[0][-2:] for line in loaded.bad] == [":3", ":5"]


def test_a_reader_of_ones_own_that_lets_half_a_pair_through_names_the_row(tmp_path):
    source = write_lines(tmp_path / "q.jsonl", [{"text": HALF}])
    reads = Task(
        name="own", read=lambda record: make_item([{"role": "user", "content": record["text"]}], "t")
    )
    with pytest.raises(UserError, match=r"q.jsonl:1: a message holds half a surrogate pair"):
        load(source, tasks={"own": reads})
