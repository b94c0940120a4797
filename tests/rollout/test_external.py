"""Rollouts from a server: our own engine answers over real sockets, in each kind's protocol, with faults."""

import dataclasses
import functools
import http.server
import itertools
import json
import logging
import pickle
import threading
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gtalign_jax.errors import UserError
from gtalign_jax.learning.logprobs import token_logprobs
from gtalign_jax.learning.vocabulary import PLAIN
from gtalign_jax.models import hf
from gtalign_jax.models.transformer import init_params
from gtalign_jax.remote.client import AttemptFailed
from gtalign_jax.remote.pool import Answer
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import external, generate, generator, servers
from gtalign_jax.rollout.backends import CompletionTerms, check_sampling, completion_call
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.sampling import SamplingConfig
from gtalign_jax.rollout.servers import ServerConfig
from tests.rollout.engine_server import Handler, Model
from tests.small import small_model

N, G = 12, 2
KEY = jax.random.key(5)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
SEEDS = np.arange(6).reshape(3, 2) * 7 + 100


@pytest.fixture(scope="module")
def engine(tokenizer) -> Engine:
    config = small_model(len(tokenizer), num_layers=1)
    buckets = BucketConfig(prompt=(4,), completion=(N,), batch=(1, 3))
    # Several end tokens, so that rows of a random model end early often enough.
    return Engine(tokenizer, config, (tokenizer.eos_token_id, *range(40, 70)), buckets=buckets)


@pytest.fixture(scope="module")
def params(engine):
    return jax.jit(init_params, static_argnums=1)(jax.random.key(0), engine.model_config)


@pytest.fixture(scope="module")
def batch(engine):
    return engine_lib.prompt_batch(engine, PROMPTS)


@pytest.fixture(scope="module")
def embedded(engine, params, batch):
    return jax.device_get(generate.rollout(engine, params, Request(batch, KEY, G, N, seeds=SEEDS)))


@pytest.fixture
def serve(engine, params, monkeypatch):
    """Starts servers: serve() -> (URL, Model)."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start():
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.model = Model(engine, params)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", server.model

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def connect(*urls, kind="vllm", **fields):
    quick = {"wait_s": 0.01, "max_wait_s": 0.02, "timeout_s": 20.0, "in_flight": 4}
    return servers.connect(ServerConfig(kind=kind, endpoints=urls, model="m", **quick | fields))


def assert_same(got, want):
    for name in ("tokens", "length"):
        np.testing.assert_array_equal(getattr(got.prompts, name), getattr(want.prompts, name), err_msg=name)
    got, want = got.completions, want.completions
    for name in ("tokens", "length", "finished", "action_mask"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    np.testing.assert_allclose(got.logp, want.logp, atol=1e-5)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_gives_the_rollout_of_the_engine(serve, engine, params, batch, embedded, kind):
    """The same seeds, the same tokens, and the trainer's log-probabilities; /v1 in the URL is no matter."""
    url, model = serve()
    served = functools.partial(external.rollout, connect(url + "/v1/", kind=kind))
    got = served(engine, None, Request(batch, KEY, G, N, seeds=SEEDS))
    assert_same(got, embedded)
    prompts, written = got.prompts, got.completions
    assert written.finished.any() and not written.finished.all()
    logp = jax.jit(token_logprobs, static_argnums=(1, 4))(
        params, engine.model_config, prompts, written.tokens, PLAIN
    )[0]
    np.testing.assert_allclose(np.where(written.action_mask, logp, 0), written.logp, atol=1e-5)
    assert len(model.seen) == 6


def test_a_group_is_one_request_and_its_seed_comes_from_key_and_row(serve, engine, batch):
    url, model = serve()
    server = connect(url)
    whole = external.rollout(server, engine, None, Request(batch, KEY, G, N))
    assert sorted(len(body["prompt"]) for _, body in model.seen) == [1, 3, 4]
    assert all(body["n"] == G and body["max_tokens"] == N for _, body in model.seen)
    assert len({body["seed"] for _, body in model.seen}) == 3
    assert len({tuple(row) for row in whole.completions.tokens.reshape(-1, N)}) == 6
    last = jax.tree.map(lambda x: x[2:], batch)
    part = external.rollout(server, engine, None, Request(last, KEY, G, N, first_row=2))
    assert_same(part, jax.tree.map(lambda x: x[2:], whole))
    numbers = server.pool.numbers()
    assert numbers["requests"] == numbers["attempts"] == 4
    assert numbers["tokens"] == whole.completions.length.sum() + part.completions.length.sum()


def test_sampling_settings_reach_the_server(serve, engine, batch):
    url, model = serve()
    settings = [
        ("vllm", SamplingConfig(temperature=0.7, repetition_penalty=1.1, top_k=9, min_p=0.01)),
        ("vllm", SamplingConfig(top_k=9, top_p=0.9)),
        ("sglang", SamplingConfig(temperature=0.7)),
    ]
    for kind, sampling in settings:
        model.seen.clear()
        engine = dataclasses.replace(engine, sampling=sampling)
        external.rollout(connect(url, kind=kind), engine, None, Request(batch, KEY, 1, N))
        for path, body in model.seen:
            said = body["sampling_params"] if path == "/generate" else body
            for field in dataclasses.fields(sampling):
                assert said[field.name] == (getattr(sampling, field.name) or field.name == "top_k" and -1)
            assert said["stop_token_ids"] == list(engine.eos_ids)
    engine = dataclasses.replace(engine, sampling=settings[1][1])
    with pytest.raises(UserError, match="sampling.top_k: not in the OpenAI protocol"):
        external.rollout(connect(url, kind="openai"), engine, None, Request(batch, KEY, 1, N))


@pytest.mark.parametrize(
    ("kind", "fields", "name"),
    [
        ("vllm", {"min_p": 0.1, "top_p": 0.9}, "min_p"),
        ("vllm", {"min_p": 0.1, "top_k": 5, "top_p": 0.9}, "min_p"),
        ("sglang", {"min_p": 0.1}, "min_p"),
        ("sglang", {"top_p": 0.9}, "top_p"),
        ("sglang", {"top_k": 5}, "top_k"),
        ("sglang", {"temperature": 0.0, "repetition_penalty": 1.1}, "repetition_penalty"),
        ("openai", {"min_p": 0.1}, "min_p"),
    ],
)
def test_filters_whose_log_probabilities_a_server_reports_otherwise_are_refused_at_the_start(
    engine, batch, kind, fields, name, tmp_path
):
    mixed = dataclasses.replace(engine, sampling=SamplingConfig(**fields))
    with pytest.raises(UserError, match=f"^sampling.{name}[:=]"):
        external.rollout(connect("http://h", kind=kind), mixed, None, Request(batch, KEY, G, N))
    config = generator.EngineConfig(kind=kind, endpoints=("http://h",), model="m")
    with pytest.raises(UserError, match=f"^config.sampling.{name}[:=]"):
        generator.make_generator(config, mixed, tmp_path)


def test_filters_in_an_order_without_effect_and_greedy_ones_are_taken():
    for fields in ({"top_k": 5, "top_p": 0.9}, {"top_k": 5, "min_p": 0.1}, {"min_p": 0.1}):
        check_sampling("vllm", SamplingConfig(repetition_penalty=1.1, **fields))
    for kind in ("vllm", "sglang"):
        check_sampling(kind, SamplingConfig(temperature=0.0, top_k=5, top_p=0.9, min_p=0.1))


def test_a_greedy_group_is_one_request_a_sample(serve, engine, params, batch):
    """vLLM refuses n > 1 without a temperature."""
    url, model = serve()
    model.engine = greedy = dataclasses.replace(engine, sampling=SamplingConfig(temperature=0.0))
    model.spoil = lambda p, b, a: a if b["temperature"] or b["n"] == 1 else (400, {}, "n must be 1")
    got = external.rollout(connect(url), greedy, None, Request(batch, KEY, G, N))
    assert_same(got, jax.device_get(generate.rollout(greedy, params, Request(batch, KEY, G, N))))
    assert [body["n"] for _, body in model.seen] == [1] * 6


def test_rows_are_cut_at_the_token_that_completes_a_stop_string(serve, engine, params, batch, embedded):
    """A string that the engine is known to write; the server does not know of it, so the cut is made here."""
    text = engine_lib.decode_tokens(engine, embedded.completions.tokens[0, 0, 2:3])
    ending = engine_lib.make_ending(engine, [text])
    request = Request(batch, KEY, G, N, ending=ending, seeds=SEEDS)
    want = jax.device_get(generate.rollout(engine, params, request))
    url, model = serve()
    got = external.rollout(connect(url), engine, None, Request(batch, KEY, G, N, seeds=SEEDS, stops=(text,)))
    assert_same(got, want)
    assert want.completions.length[0, 0] <= 3 and want.completions.finished[0, 0]
    assert all(body["stop"] == [text] for _, body in model.seen)


# --- token texts instead of ids --------------------------------------------------------------------


def _read_texts(texts, ids=None):
    """What a standard answer with these token texts is read as, where "b" is the text of two ids."""
    ids_of = {"a": [1], "b": [2, 3], "<end>": [7]}
    terms = CompletionTerms("openai", "m", SamplingConfig(), 9, 99, (7,), (), lambda: ids_of)
    logprobs = {"tokens": texts, "token_logprobs": [-0.5] * len(texts)}
    choice = {"index": 0, "finish_reason": "stop", "logprobs": logprobs, "token_ids": ids}
    answer = Answer({"choices": [choice], "usage": None}, seconds=0.1, call_seconds=0.1)
    (found,) = completion_call(terms, [5], 1, 0).read(answer)
    return found.ids


def test_texts_are_mapped_to_ids_only_where_each_stands_for_one():
    assert _read_texts(["a", "a", "<end>"]) == (1, 1, 7)
    assert _read_texts(["token_id:2", "token_id:7"]) == (2, 7)
    assert _read_texts(["b", "b"], ids=[3, 7]) == (3, 7)
    with pytest.raises(AttemptFailed, match="texts instead of token ids, and 'b' stands for 2 ids"):
        _read_texts(["a", "b", "<end>"])
    with pytest.raises(AttemptFailed, match="'c' stands for 0 ids"):
        _read_texts(["c"])
    with pytest.raises(AttemptFailed, match="leaves out the end token"):
        _read_texts(["a"])


def test_a_standard_server_that_sends_texts(serve, engine, batch, embedded):
    """The random model writes halves of characters, whose texts are all alike: those samples are refused."""
    url, model = serve()
    server = connect(url, kind="openai")
    texts = engine_lib.token_texts(engine)
    first = embedded.completions.tokens[..., 0]
    readable = np.array([[texts.count(texts[i]) == 1 for i in row] for row in first])
    assert readable.any() and not readable.all()
    got = external.rollout(server, engine, None, Request(batch, KEY, G, 1, seeds=SEEDS)).completions
    np.testing.assert_array_equal(got.length, readable)
    np.testing.assert_array_equal(got.tokens[..., 0], np.where(readable, first, 0))
    assert server.pool.numbers()["failed/no_token_ids"] == (~readable).sum()
    assert not any("token_ids" in field for field in model.seen[0][1])


# --- faults ----------------------------------------------------------------------------------------


def http_error(status, text="broken", **headers):
    return lambda path, body, answer: (status, headers, text)


def change(**fields):
    """A choice with other fields."""
    return lambda path, body, answer: answer | {"choices": [c | fields for c in answer["choices"]]}


def edit(part, value):
    """Every choice with another `token_ids` or `token_logprobs`."""

    def spoil(path, body, answer):
        for choice in answer["choices"]:
            place = choice if part == "token_ids" else choice["logprobs"]
            place[part] = value(choice)
        return answer

    return spoil


def without_end(path, body, answer):
    for choice in answer["choices"]:
        choice |= {"finish_reason": "stop", "token_ids": [3] * len(choice["token_ids"])}
    return answer


def past_the_end(path, body, answer):
    for choice in answer["choices"]:
        choice |= {"token_ids": [45, 45], "logprobs": {"tokens": [], "token_logprobs": [-1.0, -1.0]}}
    return answer | {"usage": None}


def sleeping(path, body, answer):
    time.sleep(4)
    return answer


def without_room(path, body, answer):
    """As vLLM answers where prompt and completion do not fit into --max-model-len."""
    for choice in answer["choices"]:
        choice |= {"token_ids": [3, 3], "logprobs": {"token_logprobs": [-1.0] * 2}, "finish_reason": "length"}
    return answer | {"usage": None}


FAULTS = {
    "500": (http_error(500, "out of memory"), "http 500: out of memory"),
    "400": (http_error(400, "prompt must be a string"), "http 400: prompt must be a string"),
    "timeout": (sleeping, "timeout: no answer in 2 s"),
    "cut JSON": (lambda p, b, a: (200, {}, json.dumps(a)[:-20]), "the server's answer is not JSON"),
    "empty": (lambda p, b, a: (200, {}, ""), "no usable choices"),
    "list": (lambda p, b, a: [1], "no usable choices"),
    "no choices": (lambda p, b, a: {"choices": []}, "0 samples instead of n=2"),
    "no logprobs": (change(logprobs=None), "sends no log-probabilities"),
    "other prompt": (change(prompt_token_ids=[1]), "changed the prompt's tokens"),
    "aborted": (change(finish_reason="abort"), "ended by 'abort'"),
    "count": (lambda p, b, a: a | {"usage": {"completion_tokens": 99}}, "but it counts 99"),
    "lengths": (edit("token_ids", lambda c: c["token_ids"][:-1]), "are not as many"),
    "foreign id": (edit("token_ids", lambda c: [10**6] * len(c["token_ids"])), "another model"),
    "nan": (edit("token_logprobs", lambda c: [float("nan")] * len(c["token_ids"])), "finite number"),
    "positive": (edit("token_logprobs", lambda c: [0.5] * len(c["token_ids"])), "finite number"),
    "no room": (without_room, "stopped after 2 of 12 tokens: start it with room"),
    "no end": (without_end, "leaves out the end token"),
    "past the end": (past_the_end, "tokens follow an end token"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_fails_drops_its_group_and_says_why(serve, engine, batch, fault, caplog):
    """Only the second prompt's answers are spoilt: its rows are empty, the others are whole."""
    spoil, message = FAULTS[fault]
    url, model = serve()
    quick = {"tries": 1, "timeout_s": 2.0} if fault == "timeout" else {"tries": 2}
    server = connect(url, **quick)
    model.spoil = lambda path, body, answer: spoil(path, body, answer) if body["prompt"] == [8] else answer
    with caplog.at_level(logging.WARNING):
        got = external.rollout(server, engine, None, Request(batch, KEY, G, N)).completions
    assert not got.length[1].any() and not got.finished[1].any() and not got.action_mask[1].any()
    assert not got.logp[1].any() and not got.tokens[1].any()
    assert (got.length[[0, 2]] > 0).all()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("2 of 6 samples are missing") and url in line
    assert message in line
    numbers = server.pool.numbers()
    assert numbers["failed"] == 1 and numbers["requests"] == 3


def test_a_fault_that_passes_costs_a_retry_and_no_sample(serve, engine, batch):
    url, model = serve()
    server, want = connect(url), external.rollout(connect(url), engine, None, Request(batch, KEY, G, N))
    fails = iter(
        [http_error(503), http_error(429, **{"Retry-After": "0.01"}), lambda p, b, a: (200, {}, "{")]
    )
    model.spoil = lambda p, b, a: next(fails, lambda p, b, a: a)(p, b, a)
    assert_same(external.rollout(server, engine, None, Request(batch, KEY, G, N)), want)
    numbers = server.pool.numbers()
    assert numbers["retries"] == 3 and "failed" not in numbers


def test_another_server_takes_over(serve, engine, batch):
    """One refuses every request for good, the third does not exist: nothing is lost."""
    (good, _), (bad, model) = serve(), serve()
    model.spoil = http_error(404, "no such model")
    want = external.rollout(connect(good), engine, None, Request(batch, KEY, G, N))
    server = connect(bad, "http://127.0.0.1:9", good)
    assert_same(external.rollout(server, engine, None, Request(batch, KEY, G, N)), want)


def test_when_nothing_came_back_the_run_ends_with_the_reason(serve, engine, batch):
    url, model = serve()
    model.spoil = http_error(400, "prompt must be a string")
    with pytest.raises(UserError, match=r"none of 6 samples came back \(http.*400: prompt must be a string"):
        external.rollout(connect(url), engine, None, Request(batch, KEY, G, N))
    assert len(model.seen) == 3  # a refusal is the same at the next try
    model.spoil = sleeping
    late = connect(url, call_timeout_s=0.1)
    with pytest.raises(UserError, match="no answer within call_timeout_s=0.1"):
        external.rollout(late, engine, None, Request(batch, KEY, G, N))


def test_a_key_that_a_server_repeats_is_in_no_reason(
    serve, engine, params, batch, tmp_path, monkeypatch, caplog
):
    """In a refusal, in an answer that does not fit, and in the word for weights that are not taken."""
    monkeypatch.setenv("ENGINE_KEY", "sk-not-for-others")
    url, model = serve()
    server = connect(url, api_key_env="ENGINE_KEY", tries=1)
    for spoil in (http_error(401, "your key sk-not-for-others"), change(finish_reason="sk-not-for-others")):
        model.spoil = spoil
        with pytest.raises(UserError, match=r"none of .*\*\*\*") as error:
            external.rollout(server, engine, None, Request(batch, KEY, G, N))
        assert "sk-not" not in str(error.value)
    said = {"success": False, "message": "x" * 150 + "sk-not-for-others"}
    model.spoil = lambda p, b, a: said if "update" in p else a
    server = connect(url, kind="sglang", api_key_env="ENGINE_KEY", tries=1)
    with pytest.raises(UserError, match=r"xxx\*\*\*") as error:
        external.push_weights(server, params, engine, tmp_path / "engine")
    assert "sk-not" not in str(error.value) + caplog.text


def test_a_constraint_is_refused(engine, batch):
    with pytest.raises(UserError, match="no server can be told that a chain ends within the budget"):
        external.rollout(connect("http://h"), engine, None, Request(batch, KEY, G, N, constraint=object()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "trt"}, "kind='trt': use one of embedded, vllm, sglang, openai"),
        ({"endpoints": "http://h"}, "must be a list of URLs"),
        ({"endpoints": ("h:8000",)}, "'h:8000' is no http"),
        ({"endpoints": ()}, "endpoints is empty"),
        ({"model": ""}, "model is empty"),
        ({"in_flight": 0}, "in_flight=0: must be a finite number at least 1"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY: this environment variable is not set"),
        ({"kind": "embedded"}, "needs no server"),
    ],
)
def test_a_config_that_cannot_work_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        servers.connect(ServerConfig(**{"kind": "vllm", "endpoints": ("http://h",), "model": "m"} | fields))


# --- weights ---------------------------------------------------------------------------------------


def test_pushed_weights_are_those_that_answer(serve, engine, batch, tmp_path, caplog):
    """The second server refuses them: it is asked no more until it takes a later push."""
    fresh = jax.jit(init_params, static_argnums=1)(jax.random.key(9), engine.model_config)
    want = jax.device_get(generate.rollout(engine, fresh, Request(batch, KEY, G, N, seeds=SEEDS)))
    (good, _), (bad, model) = serve(), serve()
    server = connect(good, bad, kind="sglang", tries=1)
    model.spoil = lambda p, b, a: {"success": False, "message": "no space"} if "update" in p else a
    with caplog.at_level(logging.WARNING):
        assert external.push_weights(server, fresh, engine, tmp_path / "engine") == 1
    assert "left out for now" in caplog.text and "no space" in caplog.text
    assert_same(external.rollout(server, engine, None, Request(batch, KEY, G, N, seeds=SEEDS)), want)
    assert [path for path, _ in model.seen] == ["/update_weights_from_disk"]
    model.spoil = lambda p, b, a: a
    assert external.push_weights(server, fresh, engine, tmp_path / "engine") == 2
    assert_same(external.rollout(server, engine, None, Request(batch, KEY, G, N, seeds=SEEDS)), want)
    assert len(model.seen) > 2
    assert not list(tmp_path.glob("engine.*"))


def test_vllm_reloads_and_forgets_what_it_cached(serve, engine, params, tmp_path):
    url, model = serve()
    folder, server = tmp_path / "engine", connect(url)
    external.push_weights(server, params, engine, folder)
    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    assert model.seen == [("/collective_rpc", reload), ("/reset_prefix_cache", {})]
    sent = pickle.loads(pickle.dumps(server.given.calls))  # as process 0 tells the others of a run
    assert {place: (call.path, call.body) for place, call in sent.items()} == {0: ("/collective_rpc", reload)}
    model.spoil = http_error(404, "Not Found")
    with pytest.raises(UserError, match="no server loaded .*http 404: Not Found.*VLLM_SERVER_DEV_MODE=1"):
        external.push_weights(connect(url), params, engine, folder)
    with pytest.raises(UserError, match="takes no new weights"):
        external.push_weights(connect(url, kind="openai"), params, engine, folder)


def fresh_params(engine, seed):
    return jax.jit(init_params, static_argnums=1)(jax.random.key(seed), engine.model_config)


def test_vllm_that_was_started_from_another_folder_takes_the_weights(serve, engine, batch, tmp_path, caplog):
    """It is told the path; that its answers move is seen at the second push."""
    url, model = serve()
    server = connect(url)
    for seed in (9, 10):
        fresh = fresh_params(engine, seed)
        want = jax.device_get(generate.rollout(engine, fresh, Request(batch, KEY, G, N, seeds=SEEDS)))
        external.push_weights(server, fresh, engine, tmp_path / "engine")
        assert_same(external.rollout(server, engine, None, Request(batch, KEY, G, N, seeds=SEEDS)), want)
    assert server.pool.numbers()["pushes"] == 2 and "unmoved" not in server.pool.numbers()
    assert not caplog.records


def test_weights_that_a_server_cannot_read_are_not_taken_from_its_own_folder(serve, engine, params, tmp_path):
    """A vLLM that does not see the path says so; without one it would load the old weights."""
    url, model = serve()
    said = "Worker failed with error 'Repo id must use alphanumeric chars'"
    model.spoil = lambda p, body, a: (500, {}, said) if body.get("kwargs") else a
    with pytest.raises(UserError, match="no server loaded .*http 500: Worker failed with error 'Repo id"):
        external.push_weights(connect(url), params, engine, tmp_path / "engine")
    assert all(body.get("kwargs") for _, body in model.seen)


def test_a_server_that_was_started_again_is_given_the_weights_before_it_is_asked(
    serve, engine, params, batch, tmp_path
):
    """It comes back in the middle of a rollout with those that it was started with."""
    url, model = serve()
    server, fresh = connect(url, patience_s=20.0), fresh_params(engine, 9)
    external.push_weights(server, fresh, engine, tmp_path / "engine")
    want = external.rollout(server, engine, None, Request(batch, KEY, G, N))
    counts, answered = itertools.count(), []

    def restarting(path, body, answer):
        if 1 <= next(counts) < 9:
            model.params = params
            return 503, {}, "starting"
        answered.append(path)
        return answer

    model.spoil = restarting
    assert_same(external.rollout(server, engine, None, Request(batch, KEY, G, N)), want)
    assert answered == ["/v1/completions", "/collective_rpc", "/v1/completions", "/v1/completions"]


def test_weights_that_never_follow_are_loudly_warned_of(serve, engine, params, tmp_path, caplog):
    """A vLLM that knows no weights_path: it answers 200 and reads its own folder again. Equal weights and a
    first push, after which nothing is known, are no reason to warn."""
    url, model = serve()
    folder = tmp_path / "engine"
    unknown = "reload_weights() got an unexpected keyword argument"
    model.answer = lambda path, body, answer=model.answer: (
        (400, {}, unknown) if "kwargs" in body else answer(path, body)
    )
    server = connect(url, tries=1)
    with caplog.at_level(logging.WARNING):
        for tree in (params, params):
            external.push_weights(server, tree, engine, folder)
        assert not caplog.records and "unmoved" not in server.pool.numbers()
        external.push_weights(server, fresh_params(engine, 9), engine, folder)
    (line,) = [record.getMessage() for record in caplog.records]
    assert url in line and "start it from that folder" in line and str(folder) in line
    assert server.pool.numbers()["unmoved"] == 1


def test_pushed_folders_hold_the_head_of_tied_embeddings(serve, engine, params, tmp_path):
    """vLLM keeps a head of its own on a CPU; an export stays as transformers would write it."""
    assert engine.model_config.tie_embeddings
    url, _ = serve()
    external.push_weights(connect(url), params, engine, tmp_path / "engine")
    hf.save_params(params, engine.model_config, tmp_path / "export")
    pushed, exported = (load_file(tmp_path / n / "model.safetensors") for n in ("engine", "export"))
    assert set(pushed) - set(exported) == {"lm_head.weight"}
    np.testing.assert_array_equal(pushed["lm_head.weight"], pushed["model.embed_tokens.weight"])
    again = hf.load_params(tmp_path / "engine", engine.model_config)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_servers_that_are_away_for_a_while_end_no_run(serve, engine, params, batch, tmp_path):
    """In a rollout, and in a hand-over, for which one of two that is back is enough."""
    url, model = serve()
    server = connect(url, "http://127.0.0.1:9", tries=1, patience_s=20.0, rest_s=0.01)
    until = time.monotonic() + 0.5
    model.spoil = lambda p, b, a: (503, {}, "starting") if time.monotonic() < until else a
    got = external.rollout(server, engine, None, Request(batch, KEY, G, N))
    assert (got.completions.length > 0).all()
    until = time.monotonic() + 0.5
    assert external.push_weights(server, params, engine, tmp_path / "engine") == 1
    impatient = connect(url, tries=1, patience_s=0.0)
    until = time.monotonic() + 5
    with pytest.raises(UserError, match="503"):
        external.rollout(impatient, engine, None, Request(batch, KEY, G, N))
