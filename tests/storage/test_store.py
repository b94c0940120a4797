"""What `drafts` promises, on a store."""

import ast
import pathlib
import re

import pytest

import gtalign_jax
from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.files import drafts, paths


def test_a_file_is_there_whole_or_not_at_all(bucket):
    path = paths.path(f"{bucket}/files/lines.jsonl")
    assert jsonl.read(path) == []
    jsonl.write(path, [{"a": 1}, {"b": "\u2028"}])
    assert jsonl.read(path) == [{"a": 1}, {"b": "\u2028"}]

    def half():
        with drafts.file(path) as sink:
            sink.write("half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert jsonl.read(path) == [{"a": 1}, {"b": "\u2028"}]
    assert list(jsonl.stream(str(path))) == [(1, {"a": 1}), (2, {"b": "\u2028"})]
    assert [str(found) for found in drafts.files_under(path.parent)] == [str(path)]


def test_a_folder_takes_the_place_of_an_older_one(bucket):
    target = paths.path(f"{bucket}/folders/hf")
    for content, keeps in (("old", ()), ("new", ["notes"])):
        with drafts.folder(target, keeps) as draft:
            (draft.folder / "config.json").write_text(content)
            (draft.folder / "tensors").write_text(content)
            draft.pass_on("tensors")
            assert not (draft.folder / "tensors").exists()
            (draft.folder / content).write_text(content)
        jsonl.write_atomic(target / "notes", "mine")
    names = {"config.json": "new", "tensors": "new", "new": "new", "notes": "mine"}
    assert {path.name: path.read_text() for path in drafts.files_under(target)} == names
    assert [path.name for path in target.parent.iterdir()] == ["hf"]


def test_an_error_leaves_the_older_folder(bucket):
    target = paths.path(f"{bucket}/left/hf")
    jsonl.write_atomic(target / "config.json", "old")

    def half():
        with drafts.folder(target) as draft:
            (draft.folder / "config.json").write_text("new")
            draft.pass_on("config.json")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert {path.name: path.read_text() for path in drafts.files_under(target.parent)} == {
        "config.json": "old"
    }


def test_one_of_two_creates_a_file(bucket):
    path = paths.path(f"{bucket}/locks/run.lock")
    assert drafts.age(path) is None
    assert drafts.create(path, "first") and not drafts.create(path, "second")
    drafts.touch(path, "first")
    assert abs(drafts.age(path)) < 60
    assert not drafts.withdraw(path, "second") and path.read_text() == "first"
    assert drafts.withdraw(path, "first") and not path.exists()


def test_no_text_of_a_user_becomes_a_local_path_at_once():
    """`pathlib.Path("gs://bucket")` is a folder named `gs:`; `paths.path` knows better."""
    package = pathlib.Path(gtalign_jax.__file__).parent
    jobs = [*package.parent.glob("experiments/[!b]*.py")]  # benchmarks write what they measure to stdout
    found = []
    for path in [path for path in [*package.rglob("*.py"), *jobs] if path.parent.name != "files"]:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        made = [node for node in calls if ast.unparse(node.func) in ("pathlib.Path", "Path")]
        named = [ast.unparse(argument) for node in made for argument in node.args]
        of_users = [text for text in named if re.search(r"^(?!tempfile).*\b(path|flags|folder)\b", text)]
        found += [f"{path.name}: {text}" for text in of_users]
    assert found == []


@pytest.mark.parametrize(
    "name", ["gs:/bucket/x", "gcs://bucket/x", "GS://bucket/x", "gs//bucket", "s3:x", "gs://"]
)
def test_a_misspelt_store_is_no_local_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (
        paths.path,
        lambda text: jsonl.write_atomic(text, "x"),
        lambda text: drafts.make_folder(text, "f"),
    ):
        with pytest.raises(UserError, match="write gs://"):
            write(name)
    assert list(tmp_path.iterdir()) == []
    assert paths.path("./gs:/x").parts == ("gs:", "x")
