"""What the commands on files write to: never their input, through pipes, whole or not at all."""

import json
import os
import subprocess
import sys

import pytest

from experiments import generate, logprobs, normalize, score

LINES = {
    normalize: {"sources": ["a", "a"], "scores": [1, 2]},
    score: {"task": "math", "completion": "x", "ground_truth": "4", "judge_text": "1"},
    generate: {"token_ids": [1]},
    logprobs: {"token_ids": [1]},
}
COMMANDS = pytest.mark.parametrize(
    "command", list(LINES), ids=[command.__name__.split(".")[1] for command in LINES]
)


def arguments(command, source, out) -> list[str]:
    if command in (normalize, score):
        return [str(source), str(out)]
    name = "prompts" if command is generate else "tokens"
    return ["--model=none", f"--{name}={source}", f"--out={out}"]


@COMMANDS
@pytest.mark.parametrize("how", ["same", "soft", "hard"])
def test_output_that_is_the_input_is_refused(tmp_path, write_lines, refused, command, how):
    source = tmp_path / "in.jsonl"
    write_lines(source, [LINES[command]])
    before, out = source.read_bytes(), source if how == "same" else tmp_path / "out.jsonl"
    if how == "soft":
        out.symlink_to(source)
    elif how == "hard":
        os.link(source, out)
    assert f"is the input {source}" in refused(command.main, arguments(command, source, out))
    assert source.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", out.name}


@pytest.fixture
def cheap(monkeypatch):
    """generate and logprobs without a model, from `lines`; an exception among them is raised."""

    def write(lines):
        for line in lines:
            if isinstance(line, BaseException):
                raise line
            yield line

    def patch(*lines):
        monkeypatch.setattr(generate, "open_engine", lambda *_: (None, None, None))
        monkeypatch.setattr(generate, "complete", lambda *_, **__: write(lines))
        monkeypatch.setattr(logprobs, "load_engine", lambda *_: (None, None))
        monkeypatch.setattr(logprobs, "score", lambda *_: write(lines))

    return patch


@COMMANDS
def test_a_full_disk_is_one_line(tmp_path, write_lines, refused, cheap, command):
    cheap({"a": 1})
    source = write_lines(tmp_path / "in.jsonl", [LINES[command]])
    line = refused(command.main, arguments(command, source, "/dev/full"))
    assert line.startswith("error: /dev/full: writing failed (No space left on device)")


@COMMANDS
def test_output_to_stdout_goes_through(tmp_path, write_lines, cheap, command):
    cheap({"a": 1})
    source = write_lines(tmp_path / "in.jsonl", [LINES[command]])
    with (tmp_path / "out.jsonl").open("w") as file:
        inode = os.fstat(file.fileno()).st_ino
        command.main(arguments(command, source, f"/dev/fd/{file.fileno()}"))
    assert (tmp_path / "out.jsonl").stat().st_ino == inode
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("command", [generate, logprobs], ids=["generate", "logprobs"])
@pytest.mark.parametrize(
    ("stop", "end"),
    [(KeyboardInterrupt(), SystemExit), (ValueError("x"), ValueError)],
    ids=["ctrl-c", "fault"],
)
def test_what_was_done_when_stopped_is_kept_beside_the_output(
    tmp_path, write_lines, cheap, caplog, command, stop, end
):
    cheap({"a": 1}, {"a": 2}, stop, {"a": 3})
    source, out = write_lines(tmp_path / "in.jsonl", [LINES[command]]), tmp_path / "out.jsonl"
    out.write_text("before")
    with pytest.raises(end):
        command.main(arguments(command, source, out))
    (kept,) = tmp_path.glob(".out.jsonl.*.incomplete")
    assert [json.loads(line) for line in kept.read_text().splitlines()] == [{"a": 1}, {"a": 2}]
    assert out.read_text() == "before" and f"what there is of it is in {kept}" in caplog.text


def test_a_kill_keeps_every_line_that_was_done(tmp_path):
    code = (
        "import os, signal; from gtalign_jax import jsonl\n"
        "def lines():\n"
        "    yield {'a': 1}\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"jsonl.write({str(tmp_path / 'out')!r}, lines(), keep=True)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (kept,) = tmp_path.iterdir()
    assert kept.read_text() == '{"a": 1}\n'


def test_a_stopped_generation_goes_on_after_its_whole_prompts(tmp_path, write_lines, monkeypatch, refused):
    asked = [{"token_ids": [1], "id": name} for name in "abc"]
    source, out = write_lines(tmp_path / "in.jsonl", asked), tmp_path / "out.jsonl"
    lines = [{"id": name, "sample": g, "text": name} for name in "abc" for g in (0, 1)]

    def complete(engine, params, prompts, flags, write, begin):
        return iter(lines[begin * flags.n :])

    monkeypatch.setattr(generate, "open_engine", lambda *_: (None, None, None))
    monkeypatch.setattr(generate, "complete", complete)
    flags = [*arguments(generate, source, out), "--n=2"]
    left = tmp_path / ".out.jsonl.0.incomplete"
    left.write_text(
        "".join(json.dumps({**line, "text": "kept"}) + "\n" for line in lines[:3]) + '{"id": "b", '
    )
    generate.main([*flags, f"--resume={left}"])
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{**line, "text": line["id"]} for line in written] == lines
    assert [line["text"] for line in written] == ["kept", "kept", "b", "b", "c", "c"]
    assert "line 2 is not of these prompts with --n=1" in refused(
        generate.main, [*arguments(generate, source, out), f"--resume={left}"]
    )
    assert "--resume=nowhere: not found" in refused(generate.main, [*flags, "--resume=nowhere"])


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_full_disk_behind_stdout_is_one_line(write_lines, tmp_path, unbuffered):
    row = {"input": "x", "source": "s", "user_reward": 0.5, "llm_reward": 0.5}
    source = write_lines(tmp_path / "in.jsonl", [row])
    command, env = (
        [sys.executable, "-m", "experiments.analyze", source, source],
        {"PYTHONUNBUFFERED": unbuffered},
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, env=os.environ | env, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: output: writing failed (No space left on device)")
