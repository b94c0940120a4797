"""Stages without a bar say what is waited for, and only when it takes long."""

import itertools
import threading

import pytest

from gtalign_jax.run.progress import stage


def test_a_short_stage_says_nothing(capsys):
    with stage("load the model"):
        pass
    assert capsys.readouterr().err == ""


def test_a_long_stage_says_that_it_runs_and_when_it_is_done(capsys):
    with stage("load the model", after=0.0):
        threading.Event().wait(0.2)
        assert capsys.readouterr().err == "load the model ...\n"
    assert capsys.readouterr().err == "load the model: done in 0:00\n"


def test_a_stage_with_parts_says_what_is_left(capsys):
    times = iter([0.0, 4.0, 12.0, 13.0, 40.0])
    with stage("evaluate", 8, clock=lambda: next(times)) as advance:
        advance(1)
        advance(3)
        advance(4)
    assert capsys.readouterr().err.splitlines() == ["evaluate 3/8  0:20 left", "evaluate: done in 0:40"]


def test_a_stage_that_fails_is_not_done(capsys):
    def fail():
        with stage("save", after=0.0):
            threading.Event().wait(0.2)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert capsys.readouterr().err == "save ...\n"


def test_a_stage_that_cannot_tell_by_itself_is_asked_what_is_behind(capsys):
    """As of a judge, whose answers come on other threads."""
    behind = itertools.chain([0], itertools.repeat(12))
    with stage("judge", 32, after=0.0, line_seconds=0.01, done=lambda: next(behind)):
        threading.Event().wait(0.5)
    first, *told, last = capsys.readouterr().err.splitlines()
    assert first == "judge ..." and last.startswith("judge: done in ")
    assert told and all(line.startswith("judge 12/32  ") and line.endswith(" left") for line in told)
