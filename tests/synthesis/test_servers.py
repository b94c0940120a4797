"""Teachers at servers: what a bad answer costs, what an outage does, and that nothing is bought twice."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from gtalign_jax.errors import UserError
from gtalign_jax.game.moves import KEYS
from gtalign_jax.synthesis.store import records
from tests.synthesis.conftest import REPO, component_of, small
from tests.synthesis.test_candidates import check, made, served


def of(component, body):
    return component_of(body["messages"][-1]["content"]) == component


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"text": "cut here", "end": "length"}, "thinking cut off at max_tokens"),
        ({"text": "<response>hidden</response>"}, "thinking holds a tag"),
        ({"text": "\u200b"}, "thinking says nothing"),
        ({"text": "  "}, "thinking empty"),
        ({"text": "half \ud83d"}, "thinking holds half a surrogate pair"),
        (b"<html>no json</html>", "thinking bad_json"),
        (b'{"choices": []}', "thinking no_answer"),
        (400, "thinking http_400"),
    ],
)
def test_garbage_costs_its_candidate_alone_and_is_told(server, tmp_path, fault, reason):
    server.fault = lambda body, number: fault if of("thinking", body) and body["seed"] % 2 else None
    config = served(server, candidates=4, attempts=1, tries=2)
    config.data.tasks = ("math",)
    found, _ = made(config, tmp_path)
    for record in found:
        check(record)
    given_up = json.loads((tmp_path / "report.json").read_text())["tasks"]["math"]["rejected"]
    seeds = {body["seed"] for body in server.asked if of("thinking", body)}
    assert given_up.get(reason) == sum(seed % 2 for seed in seeds) > 0


def test_what_comes_wrapped_is_unwrapped(server, tmp_path):
    def wrapped(body, number):
        if of("thinking", body):
            return {"text": "<think>hm, <payoff></think>\n<thinking>\nAsk first.\n</thinking>"}
        if of("matrix", body):
            cells = ", ".join(f"'{key}': {{'LLM': {i}, 'user': 1,}}" for i, key in enumerate(KEYS))
            return {"text": f"Here it is:\n```json\n{{{cells}}}\n```\nI hope it helps."}
        return {"text": "</think>All of them: choose DA"} if of("analysis", body) else None

    server.fault = wrapped
    found, _ = made(served(server), tmp_path)
    start = '<thinking>\nAsk first.\n</thinking>\n<payoff>\n{"DQ_AQ": {"LLM": 0.0, "user": 1.0}, "DQ_CQ"'
    assert all(record["chain"].startswith(start) for record in found)
    assert all(not each.get("failures") for record in found for each in record["candidates"])


def test_busy_and_slow_servers_are_waited_for(server, tmp_path):
    _, quiet = made(served(server), tmp_path / "quiet")

    def busy(body, number):
        if number % 7 == 0:
            time.sleep(0.3)
        return (429, 503)[number % 2] if number % 5 == 0 else None

    server.asked, server.fault = [], busy
    _, data = made(served(server, tries=9, timeout_s=0.2, max_wait_s=0.05), tmp_path / "busy")
    assert data == quiet


def test_an_outage_ends_in_one_line_and_the_same_command_goes_on(server, tmp_path):
    config = served(server, tries=1, patience_s=0.0)
    _, quiet = made(config, tmp_path / "quiet")
    whole = len(server.asked)
    server.asked = []
    server.fault = lambda body, number: 503 if number > whole // 2 else None
    with pytest.raises(UserError, match=r"config.synthesis.endpoints: .*http 503.*; nothing is lost"):
        made(config, tmp_path / "broken")
    assert not (tmp_path / "broken" / "train.jsonl").exists()
    assert 0 < len(list(records(tmp_path / "broken"))) < 6
    half, server.asked, server.fault = server.asked[: whole // 2], [], lambda body, number: None
    assert made(config, tmp_path / "broken")[1] == quiet
    again = {json.dumps(body) for body in server.asked} & {json.dumps(body) for body in half}
    assert not again and len(server.asked) + len(half) == whole


def test_a_server_that_refuses_all_is_one_line(server, tmp_path):
    server.fault = lambda body, number: 404
    with pytest.raises(UserError, match="config.synthesis: .*http 404.*; see endpoints, model and api_key"):
        made(served(server), tmp_path)


def test_an_answer_is_bought_once(server, tmp_path):
    made(served(server), tmp_path)
    bought, server.asked = len(server.asked), []
    for path in tmp_path.glob("parts/*"):
        path.unlink()
    made(served(server), tmp_path)
    assert bought and not server.asked


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder, port):
    """`experiments.serve` on a folder, once it answers."""
    command = [sys.executable, "-u", "-m", "experiments.serve", f"--model={folder}", f"--port={port}"]
    limits = ["--rows=8", "--max_prompt_tokens=2048", "--max_new_tokens=64"]
    process = subprocess.Popen([*command, *limits], stderr=subprocess.PIPE, text=True, cwd=REPO)
    for line in process.stderr:
        if "startup complete" in line:
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process
    raise AssertionError("the server did not start")


def test_a_real_server_that_is_killed_and_started_again_changes_nothing(speaker, tmp_path):
    port = free_port()
    config = small(analyze="solver", patience_s=120.0, max_wait_s=0.5, at_once=1)
    for component in ("thinking", "response"):
        config.synthesis[component].update(
            teacher="server", model="speaker", endpoints=(f"http://127.0.0.1:{port}/v1",), max_tokens=48
        )
    processes, in_time = [start(speaker, port)], []
    try:
        _, quiet = made(config, tmp_path / "quiet")

        def kill_and_start():
            while not list((tmp_path / "parts").glob("*")):
                time.sleep(0.01)
            processes[0].send_signal(signal.SIGKILL)
            processes[0].wait()
            processes.append(start(speaker, port))
            assert not (tmp_path / "train.jsonl").exists()  # it was waited for
            in_time.append(True)

        other = threading.Thread(target=kill_and_start)
        other.start()
        found, data = made(config, tmp_path)
        other.join()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert in_time and len(found) == 6
    assert data == quiet
    for record in found:
        check(record)
        assert record["components"]["response"]["model"] == "speaker" and record["tokens"]["out"] > 0
