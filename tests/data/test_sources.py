"""The published parquet files become items; every kind of damage is one line that names the file."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gtalign_jax.data import sources
from gtalign_jax.data.config import DataConfig
from gtalign_jax.errors import UserError
from gtalign_jax.rewards.tasks import TASKS, resolve_tasks


def write(folder, task, split, rows):
    (folder / task).mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / task / f"{split}.parquet")


def read(root, tasks, split="train"):
    return sources.read_split(str(root), [TASKS[task] for task in tasks], split)


def row(text="What?", source="math-hard", truth="4"):
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": text}]
    extra = {"single_turn_prompt": "intent", "index": 0}
    truth = {"ground_truth": truth, "style": "rule"}
    return {"prompt": prompt, "data_source": source, "reward_model": truth, "extra_info": extra}


def test_rows_become_items_and_empty_prompts_are_counted(tmp_path):
    write(tmp_path, "math", "train", [row(), row("  "), row(truth=None)])
    loaded = read(tmp_path, ["math"])
    assert [(i.id, i.task, i.ground_truth, i.intent) for i in loaded.items] == [
        (0, "math", "4", "intent"),
        (1, "math", "", "intent"),
    ]
    assert loaded.empty == 1


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "gone", ["math"]), "no such folder"),
        (lambda root: ("", ["math"]), "config.data.root=''"),
        (lambda root: (root, ["medium"]), "leave 'medium' out of config.data.tasks"),
    ],
)
def test_what_is_missing_is_named(tmp_path, break_it, message):
    write(tmp_path, "math", "train", [row()])
    with pytest.raises(UserError, match=message):
        read(*break_it(tmp_path))


def test_an_unknown_source_names_file_and_row(tmp_path):
    write(tmp_path, "math", "train", [row(), row(source="riddles")])
    with pytest.raises(UserError, match=r"train.parquet, row 1: data_source 'riddles'"):
        read(tmp_path, ["math"])


@pytest.mark.parametrize(
    ("truth", "text"),
    [(0, "0"), (0.0, "0.0"), (False, "False"), (-1, "-1"), (2.5, "2.5"), ("0", "0"), (None, "")],
)
def test_a_truth_that_is_no_text_keeps_its_value(tmp_path, truth, text):
    write(tmp_path, "math", "train", [row(truth=truth)])
    (item,) = read(tmp_path, ["math"]).items
    assert item.ground_truth == text


SAID = [{"role": "user", "content": "What?"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"reward_model": {"ground_truth": {"value": 4}}},
            "reward_model.ground_truth {'value': 4}: must be",
        ),
        ({"reward_model": {"ground_truth": float("nan")}}, "reward_model.ground_truth nan: must be finite"),
        ({"reward_model": {"style": "rule"}}, "reward_model {'style': 'rule'}: must be an object with"),
        ({"reward_model": None}, "reward_model None: must be"),
        ({"reward_model": "4"}, "reward_model '4': must be"),
        ({"prompt": None}, "prompt None: must be a list of messages"),
        ({"prompt": "What?"}, "prompt 'What?': must be a list of messages"),
        ({"prompt": 7}, "prompt 7: must be a list of messages"),
        ({"prompt": []}, "prompt []: must be a list of messages"),
        ({"prompt": [None]}, "prompt[0] None: must have a role"),
        ({"prompt": ["What?"]}, "prompt[0] 'What?': must have a role"),
        ({"prompt": [{"role": None, "content": "x"}]}, "must have a role"),
        ({"prompt": [{"content": "x"}]}, "must have a role"),
        (
            {"prompt": [{"role": "user", "content": [{"text": "x"}]}]},
            "prompt[0].content [{'text': 'x'}]: must be",
        ),
        ({"prompt": [{"role": "user", "content": 5}]}, "prompt[0].content 5: must be text"),
        ({"extra_info": "note"}, "extra_info 'note': must be an object or null"),
        ({"data_source": None}, "data_source None is not a known task"),
        ({"data_source": ["math-hard"]}, "data_source ['math-hard'] is not a known task"),
    ],
)
def test_a_row_of_another_shape_names_file_row_and_column(tmp_path, change, message):
    broken = row() | change
    write(tmp_path, "math", "train", [broken])
    with pytest.raises(UserError) as error:
        read(tmp_path, ["math"])
    assert message in str(error.value)
    assert "train.parquet, row 0: " in str(error.value) and "\n" not in str(error.value)


def test_a_row_without_extra_info_or_content_is_read(tmp_path):
    write(tmp_path, "math", "train", [row() | {"extra_info": None, "prompt": [*SAID, {"role": "user"}]}])
    assert read(tmp_path, ["math"]).empty == 1
    write(tmp_path, "math", "train", [row() | {"extra_info": None, "prompt": SAID}])
    assert read(tmp_path, ["math"]).items[0].intent == "What?"


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="train.parquet: cannot be read"):
        read(tmp_path, ["math"])


# Counts from the data's own README: rows, rows with an empty last message.
REAL = {
    ("math", "train"): (3176, 0),
    ("math", "test"): (353, 0),
    ("medium", "test"): (248, 0),
    ("ambig_qa", "test"): (300, 0),
    ("wildguard", "test"): (300, 0),
    ("minerva_math", "test"): (272, 0),
    ("ambig_coqa", "test"): (1055, 0),
    ("advbench", "test"): (520, 0),
}


def test_the_published_files_are_read_whole(shared):
    root = shared / "data" / "gtalign"
    for (task, split), (rows, empty) in REAL.items():
        loaded = read(root, [task], split)
        assert (len(loaded.items) + loaded.empty, loaded.empty) == (rows, empty), (task, split)
        assert {item.task for item in loaded.items} == {task}


def published(shared, tasks, **fields):
    """(config, tasks) of a run on the published files, all rows."""
    root = str(shared / "data" / "gtalign")
    config = DataConfig(source="gtalign", root=root, tasks=tasks, train_per_task=0, test_per_task=0, **fields)
    return config, resolve_tasks(tasks)


def test_the_math_split_leaks_as_documented(shared):
    items = sources.load_items(*published(shared, ("math", "advbench")), "test")
    assert sum(item.task == "math" and not item.seen for item in items) == 79
    assert not any(item.seen for item in items if item.task == "advbench")  # it has no training file


def test_training_rows_that_stand_in_test_can_be_left_out(shared):
    whole = sources.load_items(*published(shared, ("math",)), "train")
    config, tasks = published(shared, ("math",), decontaminate=True)
    kept = sources.load_items(config, tasks, "train")
    test = sources.load_items(config, tasks, "test")
    held_out = {item.messages[-1]["content"] for item in test}
    assert [item.messages for item in kept] == [
        item.messages for item in whole if item.messages[-1]["content"] not in held_out
    ]
    assert 0 < len(kept) < len(whole) and not any(item.seen for item in test)
