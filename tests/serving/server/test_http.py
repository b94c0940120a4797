"""The server as clients see it, on a backend that writes as fast as a test says: limits, errors, malice."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import logging
import resource
import socket
import threading
import time

import pytest

from experiments.peers.load import load
from gtalign_jax.errors import UserError
from gtalign_jax.game.pricing import Amounts
from gtalign_jax.serving.server.access import VARIABLE, Keys, Limits, read_keys
from gtalign_jax.serving.server.app import Service
from gtalign_jax.serving.server.ask import ApiError, Bounds
from gtalign_jax.serving.server.connections import Patience
from gtalign_jax.serving.server.parts import Part, Usage

AMOUNTS = Amounts((3, 2, 1))
BOUNDS = Bounds(tokens=1000, choices=8, policies=("per_token", "subscription"), amounts=AMOUNTS)
LIMITS = Limits(total=8, per_key=4, body_bytes=10_000, read_s=0.5, request_s=20.0)
PATIENCE = Patience(connections=3000, idle_s=1.0, unread_s=0.5)
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Paced:
    """Writes `max_tokens` words, each when a permit is there; counts the answers that nobody ended."""

    models = ("paced",)

    def __init__(self):
        self.pause_s, self.word, self.open, self.asked = 0.0, "word ", 0, []
        self.closed = False

    def answers(self, ask):
        self.asked.append(ask)
        if ask.prompts[0] == "slow to read":
            time.sleep(1.0)
        if ask.prompts[0] == "fail":
            raise ApiError(400, "this prompt is refused", param="prompt")
        return [self._answer(ask) for _ in ask.prompts for _ in range(ask.n)]

    async def _answer(self, ask):
        self.open += 1
        try:
            yield Part(usage=Usage(prompt=3))
            if ask.prompts[0] == "break":
                raise RuntimeError("a fault of ours")
            for i in range(ask.max_tokens or 4):
                await asyncio.sleep(self.pause_s)
                if i == 2 and ask.prompts[0] == "die":
                    raise ApiError(502, "the upstream died", code="upstream")
                yield Part(self.word, usage=Usage(completion=1))
            yield Part(finish="stop")
        finally:
            self.open -= 1

    def ready(self):
        return not self.closed

    def numbers(self):
        return {"open": self.open}

    async def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def backend():
    return Paced()


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys"
    priced = {
        "key": "sk-2",
        "name": "two",
        "pricing": {"policy": "per_token", "price": 2},
        "reasoning": "hidden",
    }
    path.write_text(f"# ours\nsk-1\n{json.dumps(priced)}\n")
    return read_keys(str(path), BOUNDS)


@pytest.fixture(scope="module")
def address(serving, backend, keys):
    with serving(Service(backend, keys, BOUNDS, LIMITS), PATIENCE) as server:
        yield server.address


@pytest.fixture(autouse=True)
def calm(backend):
    backend.pause_s, backend.word = 0.0, "word "
    yield
    until(lambda: backend.open == 0)


def until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def ask(address, body, path=TEXT, key="sk-1", method="POST"):
    """(status, headers, JSON or text) of one request."""
    line = http.client.HTTPConnection(*address, timeout=30)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    line.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body), headers)
    answer = line.getresponse()
    data = answer.read()
    line.close()
    try:
        return answer.status, answer.headers, json.loads(data)
    except ValueError:
        return answer.status, answer.headers, data.decode()


def error(answer, status):
    """The error's fields; every one has the protocol's shape."""
    found, _, body = answer
    assert found == status, body
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"] and "Traceback" not in body["error"]["message"]
    return body["error"]


def test_an_answer_and_its_events_say_the_same(address):
    status, headers, body = ask(address, {"prompt": "hi", "max_tokens": 3, "n": 2})
    assert status == 200 and [c["text"] for c in body["choices"]] == ["word word word "] * 2
    assert [c["index"] for c in body["choices"]] == [0, 1]
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12}
    assert len(headers["x-request-id"]) == 16
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    _, headers, text = ask(address, {"prompt": "hi", "max_tokens": 3, "n": 2, **streamed})
    assert headers["content-type"] == "text/event-stream"
    *events, done, rest = text.split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    events = [json.loads(event.removeprefix("data: ")) for event in events]
    assert events[-1]["usage"] == body["usage"] and events[-1]["choices"] == []
    for i in range(2):
        mine = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == i]
        assert "".join(c["text"] for c in mine) == "word word word "
        assert [c["finish_reason"] for c in mine] == [None] * 3 + ["stop"]


def test_who_has_no_key_is_told_so_and_learns_nothing(address, backend):
    asked = len(backend.asked)
    for key in (None, "", "sk-", "sk-3", "sk-1x", "é"):
        found = error(ask(address, {"prompt": "hi"}, key=key), 401)
        assert found["code"] == "invalid_api_key" and "sk-1" not in found["message"]
    assert error(ask(address, None, "/v1/models", None, "GET"), 401)
    assert len(backend.asked) == asked
    assert ask(address, None, "/health", None, "GET")[0] == 200


def test_a_key_has_defaults_that_a_request_may_change(address, backend):
    ask(address, {"prompt": "hi"}, key="sk-2")
    ask(
        address,
        {"prompt": "hi", "reasoning": "shown", "pricing": {"policy": "subscription", "price": 1}},
        key="sk-2",
    )
    ask(address, {"prompt": "hi", "analyze": "solver"}, key="sk-2")
    one, two, three = backend.asked[-3:]
    assert one.pricing.amounts == two.pricing.amounts == AMOUNTS
    assert (one.pricing.policy, one.pricing.price, one.reasoning) == ("per_token", 2.0, "hidden")
    assert (two.pricing.policy, two.reasoning) == ("subscription", "shown")
    assert (three.pricing, three.analyze) == (one.pricing, "solver")


HOSTILE = {
    "no JSON": b"{",
    "nothing": b"",
    "a list": b"[1]",
    "a number": b"7",
    "not UTF-8": b'{"prompt": "\xff"}',
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "nested": b'{"prompt": ' + b"[" * 4000 + b"]" * 4000 + b"}",
    "a long number": b'{"prompt": "hi", "seed": ' + b"9" * 6000 + b"}",
    "NaN": b'{"prompt": "hi", "temperature": NaN}',
    "NaN price": b'{"prompt": "hi", "pricing": {"policy": "per_token", "price": NaN}}',
    "infinite price": b'{"prompt": "hi", "pricing": {"policy": "per_token", "price": Infinity}}',
    "overflowing price": b'{"prompt": "hi", "pricing": {"policy": "per_token", "price": 1e999}}',
    "price as text": b'{"prompt": "hi", "pricing": {"policy": "per_token", "price": "1"}}',
    "a null price": b'{"prompt": "hi", "pricing": {"policy": "per_token", "price": null}}',
    "price of true": b'{"prompt": "hi", "pricing": {"policy": "per_token", "price": true}}',
    "no such policy": b'{"prompt": "hi", "pricing": {"policy": "os:system", "price": 1}}',
    "a policy list": b'{"prompt": "hi", "pricing": {"policy": ["per_token"], "price": 1}}',
    "more pricing": b'{"prompt": "hi", "pricing": {"policy": "per_token", "price": 1, "x": 1}}',
    "pricing as text": b'{"prompt": "hi", "pricing": "free"}',
    "a typing error": b'{"prompt": "hi", "pricng": {"policy": "per_token", "price": 1}}',
    "1,000 stop strings": json.dumps({"prompt": "hi", "stop": ["x"] * 1000}).encode(),
    "a long stop string": json.dumps({"prompt": "hi", "stop": "x" * 257}).encode(),
    "an empty stop string": b'{"prompt": "hi", "stop": ""}',
    "stops of numbers": b'{"prompt": "hi", "stop": [1]}',
    "no prompt": b"{}",
    "a null prompt": b'{"prompt": null}',
    "an empty list": b'{"prompt": []}',
    "negative ids": b'{"prompt": [-1]}',
    "mixed prompts": b'{"prompt": ["a", 1]}',
    "ids of true": b'{"prompt": [true]}',
    "n of 0": b'{"prompt": "hi", "n": 0}',
    "n of 1.5": b'{"prompt": "hi", "n": 1.5}',
    "n of true": b'{"prompt": "hi", "n": true}',
    "too many answers": b'{"prompt": ["a", "b", "c"], "n": 3}',
    "too many tokens": b'{"prompt": "hi", "max_tokens": 1001}',
    "hot": b'{"prompt": "hi", "temperature": 2.1}',
    "top_p of 0": b'{"prompt": "hi", "top_p": 0}',
    "a seed beyond": b'{"prompt": "hi", "seed": 9223372036854775808}',
    "stream as text": b'{"prompt": "hi", "stream": "yes"}',
    "many logprobs": b'{"prompt": "hi", "logprobs": 6}',
    "top_logprobs of a text": b'{"prompt": "hi", "logprobs": 1, "top_logprobs": 1}',
    "hidden logprobs": b'{"prompt": "hi", "logprobs": 1, "reasoning": "hidden"}',
    "a penalty": b'{"prompt": "hi", "frequency_penalty": 0.5}',
    "tools": b'{"prompt": "hi", "tools": [{"type": "function"}]}',
    "an analysis without a price": b'{"prompt": "hi", "analyze": "solver"}',
    "no such analysis": b'{"prompt": "hi", "analyze": "oracle"}',
    "no such reasoning": b'{"prompt": "hi", "reasoning": {}}',
    "unusable without a price": b'{"prompt": "hi", "unusable": "error"}',
    "no such unusable": b'{"prompt": "hi", "unusable": "grammar", '
    b'"pricing": {"policy": "per_token", "price": 1}}',
    "a greedy second try": b'{"prompt": "hi", "unusable": "again", "temperature": 0, '
    b'"pricing": {"policy": "per_token", "price": 1}}',
}
HOSTILE_CHATS = {
    "no messages": b"{}",
    "messages as text": b'{"messages": "hi"}',
    "an empty list": b'{"messages": []}',
    "a message of text": b'{"messages": ["hi"]}',
    "no role": b'{"messages": [{"content": "hi"}]}',
    "a role of ours": b'{"messages": [{"role": "tool", "content": "hi"}]}',
    "no content": b'{"messages": [{"role": "user"}]}',
    "an image": b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    "many logprobs": b'{"messages": [{"role": "user", "content": "hi"}], "logprobs": true, '
    b'"top_logprobs": 21}',
    "top_logprobs alone": b'{"messages": [{"role": "user", "content": "hi"}], "top_logprobs": 2}',
    "logprobs of a number": b'{"messages": [{"role": "user", "content": "hi"}], "logprobs": 2}',
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_body_is_refused_in_one_line_before_anything_is_written(address, backend, body):
    asked = len(backend.asked)
    error(ask(address, body), 400)
    assert len(backend.asked) == asked


@pytest.mark.parametrize("body", HOSTILE_CHATS.values(), ids=HOSTILE_CHATS)
def test_a_hostile_chat_is_refused_too(address, body):
    error(ask(address, body, CHAT), 400)


def test_what_only_labels_a_request_or_changes_nothing_is_taken(address):
    neutral = {
        "user": "u",
        "metadata": {"a": "b"},
        "best_of": 1,
        "presence_penalty": 0.0,
        "tools": [],
        "stop": None,
    }
    assert ask(address, {"prompt": "hi", "seed": None, "logprobs": None, **neutral})[0] == 200


def test_a_body_of_ten_megabytes_is_refused_and_the_connection_still_read(address):
    assert error(ask(address, b'{"prompt": "' + b"x" * 10_000_000 + b'"}'), 413)["code"] == "body_too_large"
    assert ask(address, {"prompt": "hi"})[0] == 200


def test_a_prompt_that_takes_long_to_read_keeps_nobody_waiting(address):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        slow = pool.submit(ask, address, {"prompt": "slow to read"})
        begun = time.monotonic()
        assert ask(address, {"prompt": "hi"}, key="sk-2")[0] == 200
        assert time.monotonic() - begun < 0.9 and not slow.done()
        assert slow.result()[0] == 200


def test_unknown_paths_and_methods_are_errors_of_the_protocol(address):
    error(ask(address, None, "/v1/nothing", method="GET"), 404)
    error(ask(address, None, TEXT, method="GET"), 405)
    error(ask(address, None, "/v1/models/other", method="GET"), 404)
    assert ask(address, None, "/v1/models/paced", method="GET")[2]["id"] == "paced"


def test_what_fails_before_the_first_event_is_an_error_and_after_it_the_last_event(address):
    assert error(ask(address, {"prompt": "fail", "stream": True}), 400)["param"] == "prompt"
    assert "log says why" in error(ask(address, {"prompt": "break"}), 500)["message"]
    error(ask(address, {"prompt": "die"}), 502)
    status, _, text = ask(address, {"prompt": "die", "stream": True})
    *_, last, done, rest = text.split("\n\n")
    assert status == 200 and done == "data: [DONE]" and not rest
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the upstream died"


def test_too_many_at_a_time_are_told_when_to_come_again(address, backend):
    """Four of one key, eight in all; each ends as answered or 429, and the places are given back."""
    backend.pause_s = 0.2
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        found = list(pool.map(lambda i: ask(address, {"prompt": "hi"}, key=f"sk-{1 + i % 2}"), range(40)))
    statuses = [status for status, _, _ in found]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 8
    for answer in found:
        if answer[0] == 429:
            assert error(answer, 429)["type"] == "rate_limit_error" and int(answer[1]["retry-after"]) >= 1
    backend.pause_s = 0.0
    assert ask(address, {"prompt": "hi"})[0] == 200


def in_work(address):
    text = ask(address, None, "/metrics", None, "GET")[2]
    return float(text.partition("\ngtalign_requests_in_work ")[2].split()[0])


def opened(address, body, path=TEXT):
    """A raw connection on which a request was sent."""
    line = socket.create_connection(address, timeout=20)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-1\r\n"
    line.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return line


def test_the_benchmarks_client_tells_how_each_stream_ended(serving, backend):
    backend.pause_s = 0.05
    bodies = [{"prompt": prompt, "max_tokens": 3} for prompt in ("hi", "fail", "die", "hi")]
    with serving(Service(backend, Keys(), BOUNDS, LIMITS)) as server:
        found = load(server.address[1], bodies, 2)
    backend.closed = False
    assert [(one.status, one.whole) for one in found] == [
        (200, True),
        (400, False),
        (200, False),
        (200, True),
    ]
    assert (found[0].text, found[0].tokens, found[2].text) == ("word word word ", 3, "word word ")
    assert found[0].first_s >= 0.05 and found[0].token_s >= 0.04
    assert load(1, bodies[:1], 1)[0].status == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_answer_with_it(address, backend, stream):
    backend.pause_s = 0.02
    line = opened(address, {"prompt": "hi", "max_tokens": 1000, "n": 3, "stream": stream})
    until(lambda: backend.open == 3)
    if stream:
        assert line.recv(100).startswith(b"HTTP/1.1 200")
    line.close()
    until(lambda: backend.open == 0, 2)


def test_a_reader_that_does_not_read_is_left(address, backend):
    backend.word = "word " * 4000
    line = opened(address, {"prompt": "hi", "max_tokens": 1000, "stream": True})
    begun = time.monotonic()
    until(lambda: in_work(address) == 1)
    until(lambda: in_work(address) == 0)
    assert time.monotonic() - begun < 5
    assert ask(address, {"prompt": "hi"})[0] == 200
    line.close()


def test_a_body_that_does_not_come_is_given_up(address):
    line = socket.create_connection(address, timeout=20)
    line.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-1\r\n" % TEXT.encode())
    line.sendall(b"Content-Length: 100\r\n\r\n{")
    assert line.recv(1000).startswith(b"HTTP/1.1 408")
    line.close()


def test_two_thousand_half_open_connections_leave_room_and_are_dropped(address):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 5000:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(5000, hard), hard))
    lines = [socket.create_connection(address, timeout=20) for _ in range(2000)]
    for line in lines[::2]:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")
    assert ask(address, {"prompt": "hi"})[0] == 200
    for line in lines:
        with contextlib.suppress(ConnectionResetError):
            assert line.recv(10) == b""
        line.close()
    assert ask(address, {"prompt": "hi"})[0] == 200


def test_connections_beyond_the_bound_are_dropped_at_once(serving, backend, keys):
    few = dataclasses.replace(PATIENCE, connections=5, idle_s=2.0)
    with serving(Service(backend, keys, BOUNDS, LIMITS), few) as server:
        lines = [socket.create_connection(server.address, timeout=20) for _ in range(9)]
        until(lambda: len(server.server_state.connections) == 5)
        until(lambda: len(server.server_state.connections) == 0)
        assert ask(server.address, {"prompt": "hi"})[0] == 200
        for line in lines:
            line.close()
    backend.closed = False


def test_an_answer_that_takes_too_long_is_given_up(serving, backend, keys):
    backend.pause_s = 0.3
    slow = dataclasses.replace(LIMITS, request_s=0.5)
    with serving(Service(backend, keys, BOUNDS, slow)) as server:
        assert error(ask(server.address, {"prompt": "hi"}), 504)["code"] == "timeout"
        with pytest.raises(http.client.IncompleteRead):
            ask(server.address, {"prompt": "hi", "stream": True})
        until(lambda: backend.open == 0)
    backend.closed = False


def test_a_stop_lets_what_is_in_work_end_and_closes_the_backend(serving, backend, keys):
    backend.pause_s = 0.1
    with serving(Service(backend, keys, BOUNDS, LIMITS)) as server:
        answers = []
        body = {"prompt": "hi", "max_tokens": 5, "stream": True}
        client = threading.Thread(target=lambda: answers.append(ask(server.address, body)))
        client.start()
        until(lambda: backend.open == 1)
        server.should_exit = True
        client.join(20)
        until(lambda: backend.closed)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(server.address, timeout=5)
    assert answers[0][0] == 200 and answers[0][2].endswith("data: [DONE]\n\n")
    backend.closed = False


def test_the_log_has_a_line_a_request_and_prompts_only_when_asked(serving, backend, keys, caplog):
    caplog.set_level(logging.INFO, "gtalign_jax.serving")
    for shown in (False, True):
        caplog.clear()
        with serving(Service(backend, keys, BOUNDS, LIMITS, log_prompts=shown)) as server:
            ask(server.address, {"prompt": "my secret", "max_tokens": 2}, key="sk-2")
            ask(server.address, {"prompt": "my secret", "n": 0})
        lines = [json.loads(record.message) for record in caplog.records if record.name.endswith("requests")]
        bad, good = sorted(lines, key=lambda line: line["prompt"])
        assert (good["status"], good["key"], good["prompt"], good["completion"]) == (200, "two", 3, 2)
        assert bad["status"] == 400 and bad["error"].startswith("n=0")
        assert ("my secret" in caplog.text) == shown and "sk-2" not in caplog.text
        if shown:
            assert good["prompts"] == ["my secret"] and good["answers"] == ["word word "]
        backend.closed = False


def test_metrics_count_what_was_done_and_nobody_is_in_work_who_has_an_answer(address):
    for _ in range(20):
        ask(address, {"prompt": "hi", "max_tokens": 2})
        assert in_work(address) == 0
    text = ask(address, None, "/metrics", None, "GET")[2]
    assert 'gtalign_requests_total{path="/v1/completions",status="200"}' in text
    assert "gtalign_open 0.0" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no key"),
        ("a b\n", ":1: key: must be printable ASCII"),
        ("ok\n{", ":2: not JSON"),
        ('{"key": "a", "price": 1}', ":1: price: no such field"),
        (
            '{"key": "a", "pricing": {"policy": "x", "price": 1}}',
            ":1: pricing.policy: must be one of per_token",
        ),
        ("a\na\n", "holds a key twice"),
    ],
)
def test_a_file_of_keys_that_is_wrong_is_named(tmp_path, text, said):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UserError, match=said):
        read_keys(str(tmp_path / "keys"), BOUNDS)


def test_keys_come_from_the_environment_too(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_keys(None, BOUNDS).keys == ()
    monkeypatch.setenv(VARIABLE, "one,two")
    assert len(read_keys(None, BOUNDS).keys) == 2
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(str(tmp_path / "none"), BOUNDS)
