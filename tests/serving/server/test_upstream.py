"""A server behind ours that dies, lies or refuses costs its own request and nothing else."""

import http.client
import http.server
import json
import ssl
import threading
import time

import numpy as np
import pytest

from experiments import serve
from gtalign_jax.chain.prompt import format_chain, payoff_json
from gtalign_jax.remote.client import open_client
from gtalign_jax.serving.server.access import Keys, Limits
from gtalign_jax.serving.server.app import Service
from gtalign_jax.serving.server.ask import Bounds
from gtalign_jax.serving.server.upstream import Upstream

PRICE = {"policy": "per_token", "price": 4}
FREE = np.array([[[2, 2], [0, 0], [2.5, 2.5]]] * 2)
HEAD = format_chain("Hm.", FREE, "", "").partition("</payoff>")[0]


def event(text=None, finish=None, **more) -> bytes:
    choice = {"index": 0, "text": text or "", "finish_reason": finish, **more}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def named(top) -> dict:
    """The logprobs of the one token of an event."""
    return {"tokens": ["b"], "token_logprobs": [-2.0], "top_logprobs": top, "text_offset": [0]}


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}\n\n'
DONE = b"data: [DONE]\n\n"
GOOD = [event("a "), event("b", "stop"), USAGE, DONE]
# Prompt → status, and the pieces of the body; None: the connection is cut, a number: seconds of silence.
SAYS = {
    "good": (200, GOOD),
    "in pieces": (200, [bytes([byte]) for byte in b"".join(GOOD)]),
    "likely": (200, [event("b", "stop", logprobs=named([{"a": -0.5, "b": -2.0}])), USAGE, DONE]),
    "odd logprobs": (200, [event("b", "stop", logprobs={"tokens": ["b"]}), USAGE, DONE]),
    "odd likely": (200, [event("b", "stop", logprobs=named([{"a": "x"}])), USAGE, DONE]),
    "likely of a list": (200, [event("b", "stop", logprobs=named([[1]])), USAGE, DONE]),
    "more likely": (200, [event("b", "stop", logprobs=named([{}, {}])), USAGE, DONE]),
    "no DONE": (200, [event("a "), event("b", "stop"), USAGE]),
    "keeps the stop": (200, [event("a b"), event("xy c", "stop"), USAGE, DONE]),
    "no usage": (200, [event("a "), event("b", "length"), DONE]),
    "comments": (200, [b": ping\r\n\r\nevent: x\r\n", *GOOD]),
    "dies": (200, [event("a "), None]),
    "ends early": (200, [event("a ")]),
    "no finish": (200, [event("a "), DONE]),
    "garbage": (200, [b"data: {{{\n\n"]),
    "not events": (200, [b"<html>hello</html>"]),
    "no choices": (200, [b'data: {"hello": 1}\n\n']),
    "a list": (200, [b"data: [1]\n\n"]),
    "odd choices": (200, [b'data: {"choices": [1]}\n\n']),
    "odd text": (200, [b'data: {"choices": [{"text": {"a": 1}, "finish_reason": null}]}\n\n']),
    "nested": (200, [b"data: " + b"[" * 100_000 + b"\n\n"]),
    "endless": (200, [b"data: " + b"x" * 100_000] * 30),
    "an error inside": (200, [event("a "), b'data: {"error": {"message": "boom sk-up"}}\n\n']),
    "silent": (200, [event("a "), 30.0]),
    "400": (400, [b'{"error": {"message": "too long, sk-up"}}']),
    "422": (422, [b'{"detail": "Unexpected fields sk-up"}']),
    "401": (401, [b'{"error": {"message": "bad key sk-up"}}']),
    "429": (429, [b"{}"]),
    "500": (500, [b"<html>"]),
    "steered": (200, [event(HEAD[:30]), event(HEAD[30:], "stop", stop_reason="</payoff>"), USAGE, DONE]),
    "a nameless stop": (200, [event(HEAD, "stop"), USAGE, DONE]),
    "stops nowhere": (200, [event(HEAD + "</payoff>\n<analyze>AQ</analyze>", "stop"), USAGE, DONE]),
    "half a matrix": (200, [event(HEAD[:90], "stop"), USAGE, DONE]),
    "no matrix": (200, [event("<payoff>x", "stop", stop_reason="</payoff>"), USAGE, DONE]),
    "another stop": (200, [event(HEAD, "stop", stop_reason="\n"), USAGE, DONE]),
}
GONE_ON = (200, [event("\n<analyze>\nchoose DA"), event(".\n</analyze>", "stop"), USAGE, DONE])


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(200, [b'{"object": "list", "data": [{"id": "behind", "object": "model"}]}'])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        self.answer(*SAYS.get(body["prompt"], GONE_ON))

    def answer(self, status, pieces):
        self.send_response(status)
        self.send_header("transfer-encoding", "chunked")
        self.send_header("content-type", "application/json" if status != 200 else "text/event-stream")
        self.end_headers()
        try:
            for piece in pieces:
                if piece is None:
                    self.close_connection = True
                    return
                if isinstance(piece, float):
                    self.server.ended.wait(piece)
                    continue
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.server.left.append(time.monotonic())


@pytest.fixture(scope="module")
def behind():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.left, server.ended = [], [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def ask(serving, behind):
    """ask(prompt, **changes): (status, headers, JSON or the text of a stream)."""
    url = f"http://127.0.0.1:{behind.server_port}/v1"
    client = open_client(url, "sk-up", 16, 2.0, ssl.create_default_context())
    backend = Upstream(client, ("behind",))
    bounds = Bounds(100, 8, ("per_token",))

    with serving(Service(backend, Keys(), bounds, Limits(request_s=5.0))) as server:

        def ask(prompt, **changes):
            line = http.client.HTTPConnection(*server.address, timeout=20)
            line.request("POST", "/v1/completions", json.dumps({"prompt": prompt, **changes}))
            answer = line.getresponse()
            data = answer.read().decode()
            line.close()
            assert "sk-up" not in data
            return answer.status, answer.headers, data if changes.get("stream") else json.loads(data)

        yield ask
        assert backend.numbers() == {"upstream_open": 0}


@pytest.mark.parametrize("prompt", ["good", "in pieces", "comments"])
def test_an_answer_is_passed_on(ask, behind, prompt):
    status, _, body = ask(prompt, max_tokens=9, seed=3, stop=["x"], top_p=0.5)
    assert status == 200 and body["choices"][0]["text"] == "a b" and body["model"] == "behind"
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    asked = behind.asked[-1]
    assert (asked["max_tokens"], asked["seed"], asked["stop"], asked["top_p"]) == (9, 3, ["x"], 0.5)
    assert "pricing" not in asked
    _, _, text = ask(prompt, stream=True)
    assert text.endswith(DONE.decode())


def test_a_stream_that_ends_without_its_mark_is_whole_where_the_answer_ended(ask):
    """As `transformers serve` has it."""
    status, _, body = ask("no DONE")
    assert status == 200 and body["choices"][0]["text"] == "a b" and body["usage"]["completion_tokens"] == 7


@pytest.mark.parametrize("stop", [["xy"], ["b"], [" bxy"], ["never", "x"]])
def test_a_stop_string_that_the_upstream_leaves_in_its_text_is_taken_out(ask, stop):
    _, _, body = ask("keeps the stop", stop=stop)
    assert body["choices"][0]["text"] == "a bxy c".partition(stop[-1])[0]
    _, _, text = ask("keeps the stop", stop=stop, stream=True)
    events = [
        json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line.startswith("data: {")
    ]
    assert "".join(e["choices"][0]["text"] for e in events) == body["choices"][0]["text"]


def test_the_likeliest_tokens_are_passed_on(ask, behind):
    _, _, body = ask("likely", logprobs=2)
    assert behind.asked[-1]["logprobs"] == 2 and "top_logprobs" not in behind.asked[-1]
    found = body["choices"][0]["logprobs"]
    assert found["tokens"] == ["b"] and found["top_logprobs"] == [{"a": -0.5, "b": -2.0}]
    _, _, body = ask("likely", logprobs=1)
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.5, "b": -2.0}]  # and the written one
    assert ask("likely", logprobs=0)[2]["choices"][0]["logprobs"]["top_logprobs"] is None


@pytest.mark.parametrize("prompt", ["odd logprobs", "odd likely", "likely of a list", "more likely"])
def test_log_probabilities_of_another_form_are_a_bad_gateway(ask, prompt):
    status, _, body = ask(prompt, logprobs=2)
    assert status == 502 and "logprobs have another form" in body["error"]["message"]


def test_several_answers_are_several_requests_with_seeds_of_their_own(ask, behind):
    before = len(behind.asked)
    status, _, body = ask(["good", "no usage"], n=2, seed=7)
    assert status == 200 and [c["finish_reason"] for c in body["choices"]] == [
        "stop",
        "stop",
        "length",
        "length",
    ]
    assert sorted(asked["seed"] for asked in behind.asked[before:]) == [7, 8, 9, 10]
    assert body["usage"]["completion_tokens"] == 14


BROKEN = [
    *("dies", "ends early", "no finish", "garbage", "not events", "no choices", "a list", "odd choices"),
    *("odd text", "nested", "endless", "an error inside", "401", "500"),
]


@pytest.mark.parametrize("prompt", BROKEN)
def test_a_broken_answer_is_a_bad_gateway_in_one_line(ask, prompt):
    status, _, body = ask(prompt)
    assert status == 502 and body["error"]["type"] == "server_error" and "\n" not in body["error"]["message"]
    assert "upstream" in body["error"]["message"]
    _, _, text = ask(prompt, stream=True)
    assert "upstream" in text
    assert ask("good")[0] == 200


def test_its_refusals_are_told_apart(ask):
    status, _, body = ask("400")
    assert status == 400 and body["error"]["message"].endswith("too long, ***")
    status, _, body = ask("422")
    assert status == 422 and body["error"]["message"].endswith("Unexpected fields ***")
    status, headers, _ = ask("429")
    assert status == 429 and int(headers["retry-after"]) >= 1
    assert ask("silent")[0] == 504


@pytest.mark.parametrize("prompt", ["steered", "a nameless stop", "stops nowhere"])
def test_a_price_edits_the_matrix_between_two_requests(ask, behind, prompt):
    status, _, body = ask(prompt, pricing=PRICE, max_tokens=90)
    assert status == 200
    (choice,) = body["choices"]
    assert choice["steering"]["steered"] and choice["steering"]["action"] == "DA"
    first, second = behind.asked[-2:]
    assert first["stop"] == ["</payoff>"] and (first["max_tokens"], second["max_tokens"]) == (90, 83)
    edited = json.dumps(choice["steering"]["edited"])
    assert second["prompt"] == f"{prompt}{HEAD.replace(payoff_json(FREE), edited)}</payoff>"
    assert prompt + choice["text"] == second["prompt"] + "\n<analyze>\nchoose DA.\n</analyze>"
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 14, "total_tokens": 24}


def test_the_solver_writes_the_analysis_that_the_upstream_goes_on_from(ask, behind):
    ask("steered", pricing=PRICE, analyze="solver")
    assert behind.asked[-1]["prompt"].endswith(": choose DA.\n</analyze>\n<response>\n")


def test_a_matrix_that_cannot_be_read_is_asked_for_again_or_an_error(ask, behind):
    before = len(behind.asked)
    _, _, body = ask("half a matrix", pricing=PRICE, unusable="again", seed=5)
    assert body["choices"][0]["steering"]["tries"] == 2 and body["choices"][0]["text"] == HEAD[:90]
    first, second = behind.asked[before:]
    assert first.pop("seed") != second.pop("seed") and first == second
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 14, "total_tokens": 24}
    status, _, body = ask("half a matrix", pricing=PRICE, unusable="error", stream=True)
    assert status == 422 and "before its matrix" in body


@pytest.mark.parametrize("prompt", ["half a matrix", "another stop", "good"])
def test_an_answer_that_ended_before_its_matrix_is_left_as_it_is(ask, behind, prompt):
    before = len(behind.asked)
    _, _, body = ask(prompt, pricing=PRICE)
    (choice,) = body["choices"]
    assert choice["text"] in (HEAD[:90], HEAD, "a b") and choice["finish_reason"] == "stop"
    assert not choice["steering"]["steered"] and "before its matrix" in choice["steering"]["reason"]
    assert len(behind.asked) == before + 1


def test_a_matrix_that_cannot_be_read_is_gone_on_with_and_flagged(ask):
    _, _, body = ask("no matrix", pricing=PRICE)
    (choice,) = body["choices"]
    assert choice["text"].startswith("<payoff>x</payoff>\n<analyze>")
    assert not choice["steering"]["steered"] and "no usable matrix" in choice["steering"]["reason"]


def test_token_ids_have_no_text_to_go_on_from(ask):
    status, _, body = ask([1, 2], pricing=PRICE)
    assert status == 400 and "must be text" in body["error"]["message"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give --model=DIR, or --upstream=URL"),
        (["--model=a", "--upstream=http://b"], "give --model=DIR, or --upstream=URL"),
        (["--upstream=http://b", "--unusable=grammar"], "--unusable=grammar: needs --model"),
        (["--upstream=nowhere"], "--upstream: 'nowhere' is no http(s) URL"),
        (["--upstream=http://127.0.0.1:9/v1"], "its models cannot be listed"),
        (["--model=x", "--rows=0"], "--rows=0: must be at least 1"),
        (["--model=x", "--request_s=nan"], "--request_s=nan: must be a number"),
        (["--model=x", "--amounts=1,2"], "--amounts=1,2: three numbers"),
        (["--model=x", "--port=70000"], "--port=70000: must be from 0"),
        (["--model=x", "--host=256.0.0.1"], "--host=256.0.0.1"),
        (["--model=x", "--keys=/nowhere"], "--keys=/nowhere: cannot be read"),
    ],
)
def test_wrong_flags_are_one_line(capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        serve.main([*flags, *([] if any("--port" in flag for flag in flags) else ["--port=0"])])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0]
