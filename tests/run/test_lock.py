"""One run at a time in a work directory: a living one is named, a dead one's lock is taken over."""

import json
import logging
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from gtalign_jax.errors import UserError
from gtalign_jax.run import lock


def write(path, **fields):
    fields = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()} | fields
    path.write_text(json.dumps({"began": psutil.Process(os.getpid()).create_time()} | fields))


def test_the_same_command_twice_is_refused_by_name(tmp_path):
    with lock.locked(tmp_path):
        held = json.loads((tmp_path / lock.NAME).read_text())
        assert (held["pid"], held["host"]) == (os.getpid(), socket.gethostname())
        named = rf"run.lock: process {os.getpid()} on {socket.gethostname()} writes there since"
        with pytest.raises(UserError, match=named), lock.locked(tmp_path):
            pass
        assert (tmp_path / lock.NAME).is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_given_back_when_a_run_fails(tmp_path):
    with pytest.raises(SystemExit), lock.locked(tmp_path / "new"):
        sys.exit(143)
    assert list((tmp_path / "new").iterdir()) == []


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, caplog):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for fields in ({"pid": gone.pid}, {"began": 1.0}):  # the number is free, or another's now
        write(tmp_path / lock.NAME, **fields)
        with caplog.at_level(logging.WARNING), lock.locked(tmp_path):
            assert "is gone; taking over" in caplog.text
        assert list(tmp_path.iterdir()) == []
        caplog.clear()


def test_on_another_host_one_that_is_still_touched_lives(tmp_path):
    path = tmp_path / lock.NAME
    write(path, host="elsewhere", time=0.0)
    with pytest.raises(UserError, match="on elsewhere"), lock.locked(tmp_path):
        pass
    os.utime(path, (time.time() - lock.STALE_S - 1,) * 2)
    with lock.locked(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_the_owner_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_S", 0.01)
    with lock.locked(tmp_path):
        path = tmp_path / lock.NAME
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)  # nothing tells of a touch by another thread


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "null"])
def test_what_is_no_lock_is_refused_and_kept(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    with pytest.raises(UserError, match="run.lock: not a lock of a run"), lock.locked(tmp_path):
        pass
    assert (tmp_path / lock.NAME).read_text() == text
