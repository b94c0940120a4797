"""Scripts on files: lines written for them, lines they wrote, and how they refuse."""

import json

import pytest


@pytest.fixture
def write_lines():
    """write_lines(path, rows): JSON lines; the path as text."""

    def write(path, rows) -> str:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def converted(tmp_path, write_lines):
    """converted(main, rows, *flags): what a script from IN.jsonl to OUT.jsonl makes of the rows."""

    def run(main, rows, *flags) -> list[dict]:
        out = tmp_path / "out.jsonl"
        main([write_lines(tmp_path / "in.jsonl", rows), str(out), *flags])
        return [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]

    return run


@pytest.fixture
def refused(capsys):
    """refused(main, arguments): the one line on stderr of a refusal with exit status 2."""

    def run(main, arguments) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return run
