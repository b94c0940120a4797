"""Outputs: nothing that is not ours is lost, written to or removed, and a draft leaves nothing behind."""

import os
import pathlib
import socket
import stat
import subprocess
import sys
import threading

import pytest

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.files import drafts, local


def test_output_to_a_symlink_replaces_the_file_it_points_to(tmp_path):
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    target.parent.mkdir()
    target.write_text("before")
    link.symlink_to(target)
    jsonl.write_atomic(link, "after")
    assert link.is_symlink() and target.read_text() == "after"
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "new")
    jsonl.write_atomic(dangling, "made")
    assert dangling.is_symlink() and (tmp_path / "new").read_text() == "made"
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(UserError, match="circle"):
        jsonl.write_atomic(circle, "x")
    assert circle.is_symlink()
    assert sorted(p.name for p in tmp_path.rglob("*incomplete")) == []


def test_output_to_a_pipe_goes_through_it(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    jsonl.write_atomic(pipe, "through\n")
    reader.join(timeout=30)
    assert read == ["through\n"] and pipe.is_fifo()


def test_output_to_a_device_or_an_open_file_goes_through_it(tmp_path):
    jsonl.write_atomic("/dev/null", "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with (tmp_path / "open").open("w") as file:
        file.write("first\n")
        file.flush()
        jsonl.write_atomic(f"/dev/fd/{file.fileno()}", "second\n")
        assert os.fstat(file.fileno()).st_ino == (tmp_path / "open").stat().st_ino
    assert (tmp_path / "open").read_text() == "first\nsecond\n"


def test_what_is_neither_a_file_nor_a_pipe_is_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(UserError, match="cannot write there"), drafts.folder(tmp_path / "socket" / "hf"):
            pass
        for place, message in ((tmp_path / "socket", "neither"), (tmp_path, "is a folder")):
            with pytest.raises(UserError, match=message):
                jsonl.write_atomic(place, "x")
        assert stat.S_ISSOCK((tmp_path / "socket").stat().st_mode)


def test_a_planted_link_is_not_followed_and_draft_names_differ(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".out.incomplete").symlink_to(victim)
    jsonl.write_atomic(tmp_path / "out", "x")
    assert victim.read_text() == "mine" and (tmp_path / ".out.incomplete").is_symlink()
    seen = []
    for _ in range(2):
        with drafts.file(tmp_path / "out") as sink:
            seen.append(sink.name)
    assert len(set(map(str, seen))) == 2
    monkeypatch.setattr(local.secrets, "token_hex", lambda _: "guessed")
    (tmp_path / ".out.guessed.incomplete").symlink_to(victim)
    with pytest.raises(UserError, match="cannot write there"):
        jsonl.write_atomic(tmp_path / "out", "x")
    assert victim.read_text() == "mine" and (tmp_path / ".out.guessed.incomplete").is_symlink()


def test_the_mode_is_that_of_a_new_file_or_of_the_one_replaced(tmp_path):
    before = os.umask(0o027)
    try:
        jsonl.write_atomic(tmp_path / "out", "x")
        with drafts.folder(tmp_path / "folder") as draft:
            (draft.folder / "a").touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750
    (tmp_path / "out").chmod(0o600)
    jsonl.write_atomic(tmp_path / "out", "y")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o600


def test_an_error_leaves_the_file_before_and_no_draft(tmp_path):
    jsonl.write_atomic(tmp_path / "out", "before")

    def half_a_file():
        with drafts.file(tmp_path / "out") as sink:
            sink.write("half")
            raise KeyError

    def half_a_folder():
        with drafts.folder(tmp_path / "folder") as draft:
            (draft.folder / "half").touch()
            raise KeyError

    for half in (half_a_file, half_a_folder):
        with pytest.raises(KeyError):
            half()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("out", "before")]


def test_a_folder_takes_the_place_of_the_one_a_link_points_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").touch()
    (tmp_path / "hf").symlink_to(tmp_path / "disk")
    for neighbour in ("disk.old", "disk.incomplete"):
        (tmp_path / neighbour).mkdir()
        (tmp_path / neighbour / "mine").touch()
    with drafts.folder(tmp_path / "hf") as draft:
        (draft.folder / "new").touch()
    assert (tmp_path / "hf").is_symlink()
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["new"]
    assert {p.name for p in tmp_path.iterdir()} == {"disk", "hf", "disk.old", "disk.incomplete"}
    assert (tmp_path / "disk.old" / "mine").exists() and (tmp_path / "disk.incomplete" / "mine").exists()


def test_a_full_disk_is_one_line_with_the_path(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="/dev/full: writing failed .No space left.*free some space") as error:
        jsonl.write_atomic("/dev/full", "x")
    assert "\n" not in str(error.value)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local.os, "replace", full)
    with pytest.raises(UserError, match="out: writing failed"):
        jsonl.write_atomic(tmp_path / "out", "x")
    assert list(tmp_path.iterdir()) == []


def test_check_finds_an_output_that_is_the_input(tmp_path):
    source = tmp_path / "in"
    source.write_text("x")
    (tmp_path / "soft").symlink_to(source)
    os.link(source, tmp_path / "hard")
    for out in (source, tmp_path / "soft", tmp_path / "hard", pathlib.Path(tmp_path, ".", "in")):
        with pytest.raises(UserError, match="--out=.*is the input"):
            drafts.check(out, "--out", source)
    assert drafts.check("/dev/null", "--out", "/dev/null") == pathlib.Path("/dev/null")
    assert drafts.check(tmp_path / "a" / "out", "--out", source) == tmp_path / "a" / "out"
    assert not (tmp_path / "a" / "out").exists()


def test_the_draft_of_a_killed_writer_is_removed_by_the_next_and_no_other(tmp_path):
    code = (
        "import os, signal, sys; from gtalign_jax.files import drafts\n"
        "with drafts.folder(sys.argv[1]) as draft:\n"
        "    (draft.folder / 'half').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "hf")], check=False)
    (left,) = tmp_path.iterdir()
    assert (left / "new" / "half").exists()
    (tmp_path / ".hf.mine.incomplete" / "new").mkdir(parents=True)
    with drafts.folder(tmp_path / "hf"):  # one that is being written is no left-over
        with drafts.folder(tmp_path / "hf") as draft:
            (draft.folder / "whole").touch()
        assert not left.exists()
        assert len(list(tmp_path.glob(".hf.*.incomplete"))) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"hf", ".hf.mine.incomplete"}
