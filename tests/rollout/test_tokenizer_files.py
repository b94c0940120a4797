"""A file of a tokenizer that is missing, damaged or of another model is one line when a folder is loaded."""

import json
import shutil

import pytest

from gtalign_jax.errors import UserError
from gtalign_jax.rollout.folder import folder_engine, load_tokenizer


@pytest.fixture
def folder(llama3_folder, tmp_path):
    return shutil.copytree(llama3_folder, tmp_path / "model")


def one_line(folder, message):
    with pytest.raises(UserError, match=message) as error:
        folder_engine(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_missing_vocabulary_is_named_and_no_empty_one_put_in_its_place(folder):
    (folder / "tokenizer.json").unlink()
    one_line(folder, r"no usable tokenizer \(tokenizer.json is missing")
    (folder / "vocab.json").write_text("{}")  # is no vocabulary without its merges
    one_line(folder, r"no usable tokenizer \(tokenizer.json is missing")
    (folder / "tokenizer.json").mkdir()
    one_line(folder, "tokenizer.json is missing, or a directory")


def test_a_vocabulary_in_the_older_files_is_read(folder):
    expected = load_tokenizer(folder)("the payoff")["input_ids"][1:]
    fields = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(fields["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in fields["model"]["merges"]))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(folder)("the payoff")["input_ids"] == expected


@pytest.mark.parametrize("content", [b"[]", b"{", b"3", b"", b'{"model": 3}', b"\xff\xfe{}", b"null"])
def test_a_damaged_vocabulary_is_named(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    one_line(folder, "no usable tokenizer .*; save one with save_pretrained")


@pytest.mark.parametrize(
    "name",
    ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"],
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"{", "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (None, "Is a directory"),
    ],
    ids=["list", "text", "cut", "latin", "directory"],
)
def test_a_file_that_is_no_object_is_named(folder, name, content, message):
    path = folder / name
    path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)
    one_line(folder, f"{name}: .*{message}")


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer_class": 3},
        {"eos_token": 3},
        {"eos_token": ["a"]},
        {"added_tokens_decoder": []},
        {"model_max_length": "x"},
        {"extra_special_tokens": [3]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_field_of_the_wrong_type_ends_in_one_line(folder, fields):
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    one_line(folder, "no usable tokenizer .*; save one with save_pretrained")


@pytest.mark.parametrize("template", [3, ["x"], {"a": 3}])
def test_a_template_that_is_no_text_ends_in_one_line(folder, template):
    (folder / "chat_template.jinja").unlink()
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | {"chat_template": template}))
    one_line(folder, "tokenizer|template")


def test_a_template_file_that_is_none_is_named(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    one_line(folder, "no usable tokenizer .*utf-8")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").mkdir()
    one_line(folder, "chat_template.jinja: is no file")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(folder):
    fields = json.loads((folder / "config.json").read_text())
    last = max(load_tokenizer(folder).get_vocab().values())
    (folder / "config.json").write_text(json.dumps(fields | {"vocab_size": last + 1}))
    assert folder_engine(folder).model_config.vocab_size == last + 1
    (folder / "config.json").write_text(json.dumps(fields | {"vocab_size": last}))
    one_line(folder, f"the tokenizer has ids up to {last}, and the model {last} .*resized")
