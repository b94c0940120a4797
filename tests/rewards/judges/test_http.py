"""The HTTP judge against a server that fails in every way: each request scored or missing, once, in order."""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import resource
import socket
import sqlite3
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtalign_jax.errors import UserError
from gtalign_jax.remote.counters import Counters
from gtalign_jax.rewards.judges import cache
from gtalign_jax.rewards.judges.base import JudgeRequest
from gtalign_jax.rewards.judges.http import (
    ConsistencyRequest,
    HttpJudgeConfig,
    make_http_consistency_judge,
    make_http_judge,
)

# How a request to each fault ends when its tries are used up, and how often it is asked in 2 tries.
FAULTS = {
    "http500": ('http 500: {"error": {"message": "out of memory"}}', 2),
    "http429": ('http 429: {"error": "slow down"}', 2),
    "http400": ('http 400: {"error": "too long"}', 1),
    "http404": ('http 404: {"error": "no such model"}', 1),
    "gzip200": ("connection failed (DecodingError)", 2),
    "gzip500": ("connection failed (DecodingError)", 2),
    "bytes500": ("http 503: ", 2),
    "loop307": ("connection failed (TooManyRedirects)", None),
    "reset": ("connection failed", 2),
    "hang": ("timeout", 2),
    "drip": ("timeout", 2),
    "cut": ("connection failed", 2),
    "half_json": ("the server's answer is not JSON", 2),
    "deep_json": ("the server's answer is not JSON", 2),
    "list_json": ("the server's answer has no choices[0]", 2),
    "page": ("the server's answer is not JSON", 2),
    "garbage": ("connection failed", 2),
    "no_choices": ("the server's answer has no choices[0]", 2),
    "no_message": ("the server's answer has no choices[0]", 2),
    "null_text": ("the server's answer holds no text", 2),
    "off_scale": ("the judge's verdict 100 is outside the scale 0, 1", 2),
    "prose": ("no verdict in the judge's text", 2),
    "thinks_on": ("the judge's reasoning was cut off (it was cut off at max_tokens)", 2),
    "thinks_apart": ("no verdict in the judge's text (it was cut off at max_tokens)", 2),
}
RETRIED = [fault for fault, (_, asks) in FAULTS.items() if asks == 2]


def ask(id, fault="", flaky="", want=1, task="math"):
    words = [f"id={id}", f"want={want}", f"fault={fault}" * bool(fault), f"flaky={flaky}" * bool(flaky)]
    return JudgeRequest(task, "2 - 1?", " ".join(filter(None, words)), "1")


def config(*urls, **changes):
    quick = dict(timeout_s=2.0, wait_s=0.01, max_wait_s=0.5, tries=2, skip_after=10**6)
    return HttpJudgeConfig(endpoints=urls, model="judge", **(quick | changes))


def dead_url():
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


def test_every_fault_ends_as_missing_with_its_reason_and_the_others_are_scored(server):
    stats = Counters()
    requests = []
    for i, fault in enumerate(FAULTS):
        requests += [ask(f"{fault}-{n}", fault) for n in range(3)] + [ask(f"good-{i}", want=i % 2)]
    verdicts = make_http_judge(config(server.url), stats)(requests)
    assert len(verdicts) == len(requests)
    for request, verdict in zip(requests, verdicts, strict=True):
        id = request.response.split()[0].removeprefix("id=")
        if "fault=" in request.response:
            reason, asks = FAULTS[id.rpartition("-")[0]]
            assert verdict.score is None and verdict.reason.startswith(reason), (id, verdict)
        else:
            want, asks = float(request.response[-1]), 1
            assert (verdict.score, verdict.reason) == (want, ""), (id, verdict)
        if asks is not None:  # followed redirects are more requests than tries
            assert server.asks[id] == asks, id
    numbers = stats.numbers()
    assert numbers["requests"] == len(requests) == numbers["scored"] + numbers["missing"]
    assert numbers["missing"] == 3 * len(FAULTS)
    assert numbers["failed/http_500"] == numbers["failed/http_429"] == numbers["failed/bad_json"] / 3 == 6
    assert numbers["failed/timeout"] == 12 and numbers["failed/cut_off"] == 12
    assert numbers["attempts"] == numbers["asked"] + numbers["retries"]


def test_one_more_try_heals_what_can_be_healed(server):
    stats = Counters()
    requests = [ask(fault, flaky=fault, want=n % 2) for n, fault in enumerate(RETRIED)]
    verdicts = make_http_judge(config(server.url), stats)(requests)
    assert [v.score for v in verdicts] == [n % 2 for n in range(len(RETRIED))]
    assert set(server.asks.values()) == {2}
    assert stats.numbers()["retries"] == len(RETRIED)


def test_each_task_is_read_on_its_own_scale(server):
    wants = {"math": 1, "medium": 4, "wildguard": 1, "advbench": 0.5, "ambig_qa": 0, "ambig_coqa": 1}
    requests = [ask(task, want=want, task=task) for task, want in wants.items()]
    verdicts = make_http_judge(config(server.url))(requests)
    assert [v.score for v in verdicts] == list(wants.values())


def test_consistency_judge(server):
    judge = make_http_consistency_judge(config(server.url))
    verdicts = judge([ConsistencyRequest("{}", f"want={want}") for want in (0, 0.5, 1, 3)])
    assert [v.score for v in verdicts] == [0, 0.5, 1, None]


def test_what_is_sent_holds_the_sampling_and_both_messages(server):
    make_http_judge(config(server.url, max_tokens=99, thinking=False))([ask("a")])
    make_http_judge(config(server.url, extra_body=False))([ask("b")])
    first, second = server.bodies
    assert [m["role"] for m in first.pop("messages")] == ["system", "user"]
    assert first == {
        **{"model": "judge", "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 99},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert set(second) == {"model", "messages", "temperature", "top_p", "max_tokens"}


def test_512_requests_are_in_flight_together_and_none_is_lost(start_server):
    """The server answers nobody before 512 requests have arrived: with fewer in flight, all would fail."""
    server, stats = start_server(barrier=512), Counters()
    judge = make_http_judge(config(server.url, concurrency=512, timeout_s=30.0), stats)
    verdicts = judge([ask(i, "hold") for i in range(600)])
    assert [v.score for v in verdicts] == [1] * 600
    assert len(server.asks) == 600 and set(server.asks.values()) == {1}
    assert server.peak == 512 == stats.numbers()["max_in_flight"]


@pytest.mark.parametrize("fault", ["hang", "reset", "drip"])
def test_dead_connections_do_not_use_up_the_pool(server, fault):
    requests = [ask(f"x{i}", fault) for i in range(9)] + [ask(f"y{i}") for i in range(24)]
    verdicts = make_http_judge(config(server.url, concurrency=3, tries=1, timeout_s=0.7))(requests)
    assert [v.score for v in verdicts] == [None] * 9 + [1] * 24


@pytest.mark.parametrize("concurrency", [3, 40])
def test_concurrency_is_bounded(server, concurrency):
    stats = Counters()
    make_http_judge(config(server.url, concurrency=concurrency), stats)([ask(i) for i in range(120)])
    assert 1 <= server.peak <= concurrency
    assert stats.numbers()["max_in_flight"] == concurrency


def test_failover_to_the_endpoints_that_work(start_server):
    good, sick = start_server(), start_server()
    sick.default = "http500"
    stats = Counters()
    judge = make_http_judge(
        config(dead_url(), sick.url, good.url, skip_after=2, skip_s=60.0, concurrency=2, tries=3), stats
    )
    assert [v.score for v in judge([ask(i) for i in range(60)])] == [1] * 60
    assert sum(sick.asks.values()) <= 4  # two failures in a row, and what was on its way meanwhile
    sick_before = sum(sick.asks.values())
    assert [v.score for v in judge([ask(f"later-{i}") for i in range(20)])] == [1] * 20
    assert sum(sick.asks.values()) == sick_before  # the next call remembers


def test_a_wrong_model_name_at_one_endpoint_is_asked_elsewhere(start_server):
    wrong, good = start_server(), start_server()
    wrong.default = "http404"
    verdicts = make_http_judge(config(wrong.url, good.url))([ask(i) for i in range(8)])
    assert [v.score for v in verdicts] == [1] * 8


def test_load_is_spread_over_healthy_endpoints(start_server):
    servers = [start_server() for _ in range(3)]
    make_http_judge(config(*(s.url for s in servers)))([ask(i) for i in range(60)])
    assert [sum(s.asks.values()) for s in servers] == [20, 20, 20]


def test_retry_after_is_obeyed_up_to_the_longest_wait(server):
    judge = make_http_judge(config(server.url, wait_s=0.0, max_wait_s=0.5))
    for fault, seconds in (("http429", 0.2), ("http429_long", 0.5)):  # the second asked for an hour
        started = time.monotonic()
        assert judge([ask(fault, flaky=fault)])[0].score == 1
        assert 0.9 * seconds <= time.monotonic() - started < 20


def test_a_call_ends_within_its_own_limit(server):
    stats = Counters()
    judge = make_http_judge(config(server.url, timeout_s=60.0, call_timeout_s=0.5, concurrency=2), stats)
    started = time.monotonic()
    verdicts = judge([ask("good"), *(ask(i, "hang") for i in range(50))])
    assert time.monotonic() - started < 5
    assert verdicts[0].score == 1
    assert {(v.score, v.reason) for v in verdicts[1:]} == {(None, "not judged within call_timeout_s=0.5")}
    assert stats.numbers()["failed/call_timeout"] == 50 == stats.numbers()["missing"]


def test_an_outage_is_missing_verdicts_and_no_exception():
    verdicts = make_http_judge(config(dead_url()))([ask(i) for i in range(20)])
    assert all(v.score is None and v.reason.startswith("connection failed") for v in verdicts)


def test_a_cached_verdict_needs_no_request(server, tmp_path):
    stats = Counters()
    cached = config(server.url, cache_dir=str(tmp_path / "cache"))
    requests = [ask(i, want=i % 2) for i in range(6)] + [ask("bad", "prose")]
    first = make_http_judge(cached, stats)(requests)
    asked = sum(server.asks.values())
    again = make_http_judge(cached, stats)(requests)  # a new judge: it was on disk
    assert [v.score for v in again] == [v.score for v in first] == [0, 1, 0, 1, 0, 1, None]
    assert {v.reason for v in again[:6]} == {"cached"}
    assert sum(server.asks.values()) - asked == server.asks["bad"] / 2 == 2  # only the missing one
    assert stats.numbers()["cache_hits"] == 6
    server.default = "http500"
    assert [v.score for v in make_http_judge(cached)(requests)] == [v.score for v in first]


def test_only_texts_with_a_verdict_are_kept(server, tmp_path):
    stats = Counters()
    judge = make_http_judge(config(server.url, cache_dir=str(tmp_path), tries=1), stats)
    verdicts = judge([ask(i, "prose" * (i % 2 == 0)) for i in range(5)])
    assert [v.score for v in verdicts] == [None, 1, None, 1, None]
    with contextlib.closing(sqlite3.connect(tmp_path / cache.FILE)) as file:
        kept = [text for (text,) in file.execute("SELECT text FROM verdict")]
    assert [r"\boxed{1}" in text for text in kept] == [True, True]
    numbers = stats.numbers()
    assert numbers["tokens_out"] == 7 * 5 and numbers["failed/no_verdict"] == 3


@pytest.mark.parametrize(
    "changes", [{"model": "other"}, {"temperature": 0.0}, {"thinking": False}, {"max_tokens": 5}]
)
def test_another_model_or_sampling_is_another_verdict(server, tmp_path, changes):
    base = config(server.url, cache_dir=str(tmp_path))
    make_http_judge(base)([ask("a")])
    make_http_judge(dataclasses.replace(base, timeout_s=2.0, concurrency=7))([ask("a")])
    assert server.asks["a"] == 1
    make_http_judge(dataclasses.replace(base, **changes))([ask("a")])
    assert server.asks["a"] == 2


def test_a_broken_cache_is_a_miss(server, tmp_path):
    stats = Counters()
    judge = make_http_judge(config(server.url, cache_dir=str(tmp_path)), stats)
    judge([ask("a")])
    for file in tmp_path.glob(f"{cache.FILE}*"):
        file.write_bytes(b"not a database" * 500)
    assert [v.score for v in judge([ask("a"), ask("b")])] == [1, 1]
    assert stats.numbers()["cache_errors"] > 0


def test_equal_requests_of_a_call_are_asked_once_and_all_answered(server):
    stats = Counters()
    requests = [ask("a"), ask("b", want=0), ask("a"), ask("c", "prose"), ask("a"), ask("c", "prose")]
    verdicts = make_http_judge(config(server.url, tries=1), stats)(requests)
    assert [v.score for v in verdicts] == [1, 0, 1, None, 1, None]
    assert server.asks == {"a": 1, "b": 1, "c": 1}
    numbers = stats.numbers()
    assert (numbers["requests"], numbers["asked"], numbers["repeated"]) == (6, 3, 3)
    assert (numbers["scored"], numbers["missing"]) == (4, 2)


def test_counters_are_plain_numbers_and_survive_odd_token_counts(server):
    stats = Counters()
    make_http_judge(config(server.url), stats)([ask("a"), ask("b"), ask("c", "odd_counts")])
    numbers = stats.numbers()
    assert all(type(value) is float for value in numbers.values())
    assert (numbers["tokens_in"], numbers["tokens_out"], numbers["answers"]) == (22, 14, 3)
    assert 0 < numbers["max_answer_s"] <= numbers["answer_s"] < 30
    assert numbers["calls"] == 1


def test_from_threads_and_from_inside_a_running_loop(server):
    judge = make_http_judge(config(server.url))

    async def inside():
        return judge([ask("loop")])

    assert asyncio.run(inside())[0].score == 1
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(judge, [ask(f"{t}-{i}", want=t % 2) for i in range(20)]) for t in range(4)]
        for t, call in enumerate(calls):
            assert [v.score for v in call.result()] == [t % 2] * 20


def test_no_requests_need_no_server():
    assert make_http_judge(config(dead_url()))([]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endpoints": ()}, "config.judge.endpoints is empty: name at least one URL"),
        ({"endpoints": ("localhost:8000/v1",)}, "endpoints: 'localhost:8000/v1' is no http"),
        ({"endpoints": ("http://",)}, "endpoints: 'http://' is no http"),
        ({"endpoints": ("http://a\n/",)}, "endpoints: 'http://a"),
        ({"endpoints": "http://host/v1"}, "endpoints='http://host/v1': must be a list of URLs"),
        ({"model": ""}, "config.judge.model is empty"),
        ({"concurrency": 0}, "concurrency=0: must be a finite number at least 1"),
        ({"tries": 0}, "tries=0: must be"),
        ({"timeout_s": 0.0}, "timeout_s=0.0: must be a finite number above 0"),
        ({"timeout_s": float("nan")}, "timeout_s=nan: must be"),
        ({"call_timeout_s": float("inf")}, "call_timeout_s=inf: must be"),
        ({"temperature": -0.1}, "temperature=-0.1: must be"),
        ({"api_key_env": "NO_SUCH_KEY"}, "config.judge.api_key_env=NO_SUCH_KEY: this environment"),
        ({"cache_dir": "/dev/null/cache"}, "config.judge.cache_dir=/dev/null/cache: unusable"),
    ],
)
def test_a_config_that_cannot_work_is_one_line_at_once(changes, message):
    fields = {"endpoints": ("http://127.0.0.1:1/v1",), "model": "judge"} | changes
    # A dataclass names the field, a UserError where it stands.
    with pytest.raises(ValueError, match=r"^\S") as error:
        make_http_judge(HttpJudgeConfig(**fields))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_more_connections_than_open_files_is_one_line():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
    try:
        with pytest.raises(UserError, match="config.judge.concurrency=512 needs 576 open files"):
            make_http_judge(config("http://127.0.0.1:1/v1"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_key_is_read_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    assert make_http_judge(config(server.url, api_key_env="JUDGE_KEY"))([ask("a")])[0].score == 1
    assert server.keys == {b"Bearer secret"}


@pytest.mark.parametrize("fault", ["echo401", "echo400", "echo503", "echo_late"])
def test_a_key_that_a_server_repeats_is_in_no_reason(server, monkeypatch, fault):
    monkeypatch.setenv("JUDGE_KEY", "sk-not-for-others")
    judge = make_http_judge(config(server.url, api_key_env="JUDGE_KEY", tries=1))
    _, verdict = judge([ask("good"), ask("a", fault)])
    assert verdict.reason.startswith("http ") and "sk-not" not in verdict.reason
    assert "***" in verdict.reason or fault == "echo_late"
    assert server.keys == {b"Bearer sk-not-for-others"}


MIXTURE = st.lists(st.sampled_from(["", "http500", "reset", "prose", "half_json", "http400"]), max_size=12)


def test_any_mixture_of_faults_keeps_order_and_count(server):
    judge = make_http_judge(config(server.url, tries=1))
    rounds = collections.Counter()

    @settings(max_examples=15)
    @given(MIXTURE)
    def check(faults):
        rounds["n"] += 1
        requests = [ask(f"{rounds['n']}-{i}", fault, want=i % 2) for i, fault in enumerate(faults)]
        scores = [v.score for v in judge(requests)]
        assert scores == [None if fault else i % 2 for i, fault in enumerate(faults)]
        assert all(server.asks[f"{rounds['n']}-{i}"] == 1 for i in range(len(faults)))

    check()
