"""JSON that is legal and of no use, in every command that reads lines: the line's number and status 2."""

import json

import pytest

from experiments import analyze, generate, logprobs, normalize, score
from gtalign_jax import jsonl
from gtalign_jax.errors import UserError

LINES = {
    analyze: {"input": "x", "source": "s", "user_reward": 0.5, "llm_reward": 0.5},
    normalize: {"sources": ["a", "a"], "scores": [1, 2]},
    score: {"task": "math", "completion": "x", "ground_truth": "4", "judge_text": "1"},
    generate: {"token_ids": [1]},
    logprobs: {"token_ids": [1]},
}
COMMANDS = pytest.mark.parametrize("command", list(LINES), ids=[c.__name__.split(".")[1] for c in LINES])
DEEP = "[" * 900 + "]" * 900


def arguments(command, source, folder) -> list[str]:
    if command is analyze:
        return [str(source), str(source)]
    if command in (normalize, score):
        return [str(source), str(folder / "out.jsonl")]
    name = "prompts" if command is generate else "tokens"
    return ["--model=none", f"--{name}={source}", f"--out={folder / 'out.jsonl'}"]


@pytest.fixture
def file_of(tmp_path):
    """file_of(line, extra): a file with that line, and after it the same with a field of this JSON more."""

    def write(line, extra, end="\n"):
        text = json.dumps(line)
        source = tmp_path / "in.jsonl"
        source.write_text(f'{text}\n{text[:-1]}, "extra": {extra}}}{end}')
        return source

    return write


@COMMANDS
@pytest.mark.parametrize("end", ["\n", ""], ids=["ended", "unended"])
@pytest.mark.parametrize(
    ("extra", "message"),
    [(DEEP, "nested 901 deep"), (f'{{"a": {DEEP}}}', "nested 902 deep"), ("9" * 5000, "over 4300 digits")],
    ids=["lists", "object", "digits"],
)
def test_json_that_cannot_be_kept_names_its_line(file_of, refused, tmp_path, command, end, extra, message):
    source = file_of(LINES[command], extra, end)
    line = refused(command.main, arguments(command, source, tmp_path))
    assert line.startswith(f"error: {source}:2: ") and message in line and len(line) < 300
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("depth", [20, jsonl.MAX_DEPTH - 1])
def test_usual_nesting_is_read_and_written(tmp_path, file_of, depth):
    source = file_of({"a": 1}, "[" * depth + "]" * depth)
    rows = [line for _, line in jsonl.stream(source)]
    jsonl.write(tmp_path / "out", rows)
    assert jsonl.read(tmp_path / "out") == rows


def test_a_byte_order_mark_is_accepted(tmp_path):
    for text in ('{"a": "ä"}\n', '\n{"a": "ä"}\n', '{"a": "ä"}'):
        (tmp_path / "in").write_bytes(text.encode("utf-8-sig"))
        assert [line for _, line in jsonl.stream(tmp_path / "in")] == [{"a": "ä"}]
        assert jsonl.read(tmp_path / "in") == [{"a": "ä"}]
        assert jsonl.read_object(tmp_path / "in") == {"a": "ä"}
    (tmp_path / "in").write_bytes('{"a": 1}\n'.encode("utf-16"))
    with pytest.raises(UserError, match="in:1: not UTF-8"):
        list(jsonl.stream(tmp_path / "in"))


def test_an_integer_beyond_float_is_no_reward(write_lines, tmp_path, refused, caplog, capsys):
    good, bad = LINES[analyze], LINES[analyze] | {"llm_reward": 10**400}
    one, two = write_lines(tmp_path / "one", [good, bad]), write_lines(tmp_path / "two", [bad])
    analyze.main([one, one, "--json"])
    assert json.loads(capsys.readouterr().out)["counts"]["a"]["invalid"] == 1
    assert "line 2: llm_reward is 1000" in caplog.text
    assert "(line 1: llm_reward is 1000" in refused(analyze.main, [two, two])
    assert "too large" in refused(analyze.main, [two, two, "--reference"])


def test_half_a_surrogate_pair_is_printed_as_its_escape(write_lines, tmp_path, capsys):
    source = write_lines(tmp_path / "in", [LINES[analyze] | {"source": "\ud800"}])
    analyze.main([source, source])
    assert "\\ud800" in capsys.readouterr().out
