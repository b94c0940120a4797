"""The benchmark of streamed data: one line a case, with what it was asked for."""

import json

import pytest

from experiments import bench_data


def lines_of(capsys, *argv):
    bench_data.main(["--workers=0", "--repeats=1", *argv])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_case_is_one_line(capsys):
    rate, small, large, memory = lines_of(capsys, "--rows=3200", "--epochs=3")
    assert {line["bench"] for line in (rate, small, large, memory)} == {"data"}
    assert rate["case"] == "rate" and rate["per_s"] > 100 and rate["target"] == 20_000
    assert 40 < rate["tokens"] < 60 and len(rate["seconds"]) == 1
    assert (small["rows"], large["rows"]) == (1000, 3200)
    assert memory["rows"] == 640 and len(memory["mib"]) == 3


@pytest.mark.parametrize("flag", ["--rows=10", "--epochs=0", "--case=none"])
def test_what_cannot_be_measured_is_one_line(capsys, flag):
    with pytest.raises(SystemExit) as stop:
        bench_data.main([flag])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
