"""A judge behind any OpenAI-compatible server: `make_http_judge(config)` is a `Judge`.

Server trouble becomes `Verdict(None, reason)`; only a mistake in the config raises, and at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import resource
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import openai

from gtalign_jax.errors import UserError
from gtalign_jax.remote.client import AttemptFailed, api_key, check_numbers, check_urls, open_client, post
from gtalign_jax.rewards.judges.base import (
    ConsistencyJudge,
    ConsistencyRequest,
    Judge,
    JudgeRequest,
    Verdict,
)
from gtalign_jax.rewards.judges.cache import TextCache, prompt_key
from gtalign_jax.rewards.judges.pool import (
    Ask,
    Connect,
    Endpoints,
    JudgeStats,
    PoolConfig,
    Reply,
    judge_all,
)
from gtalign_jax.rewards.judges.rubrics import Prompt, consistency_prompt, judge_prompt
from gtalign_jax.rewards.judges.verdict import read_on_scale

# A client looks through all its connections at every request: several small ones are faster than one big.
_CONNECTIONS = 16
_AT_LEAST = {  # field → (smallest value, whether it may be that value)
    **{name: (1, True) for name in ("concurrency", "tries", "max_tokens", "skip_after")},
    **{name: (0, False) for name in ("timeout_s", "call_timeout_s", "top_p")},
    **{name: (0, True) for name in ("temperature", "top_k", "wait_s", "max_wait_s", "skip_s")},
}


@dataclasses.dataclass(frozen=True)
class HttpJudgeConfig:
    """endpoints: base URLs such as http://host:8000/v1. model: the name the servers know it by.

    temperature, top_p, top_k, thinking, max_tokens: sampling (paper section 5). extra_body: send top_k and
    the chat template's enable_thinking, which vLLM and SGLang know and some other servers refuse.
    concurrency: requests in flight. timeout_s: of one attempt; call_timeout_s: of a whole call of the judge.
    tries: attempts a request. wait_s, max_wait_s: random exponential wait between them, and the longest
    Retry-After obeyed. skip_after, skip_s: an endpoint that failed so often in a row rests so long.
    api_key_env: environment variable with the key, empty for none. cache_dir: empty for no cache.
    """

    endpoints: tuple[str, ...] = ()
    model: str = ""
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    thinking: bool = True
    extra_body: bool = True
    max_tokens: int = 8192
    concurrency: int = 512
    timeout_s: float = 120.0
    call_timeout_s: float = 1800.0
    tries: int = 3
    wait_s: float = 0.5
    max_wait_s: float = 20.0
    skip_after: int = 3
    skip_s: float = 15.0
    api_key_env: str = ""
    cache_dir: str = ""

    def __post_init__(self):
        check_numbers(self, _AT_LEAST, "judge")
        check_urls(self.endpoints, "judge.endpoints", "http://host:8000/v1")


def make_http_judge(config: HttpJudgeConfig, stats: JudgeStats | None = None) -> Judge:
    """A judge over HTTP: `judge(requests) -> verdicts`, in order, from any thread.

    stats: where this judge counts; read it with `stats.numbers()`. Equal requests in a call are asked
    once. Raises UserError on a config that cannot work.
    """
    ask_all = _make(config, stats or JudgeStats())

    def judge(requests: Sequence[JudgeRequest]) -> list[Verdict]:
        return ask_all([judge_prompt(request) for request in requests])

    return judge


def make_http_consistency_judge(config: HttpJudgeConfig, stats: JudgeStats | None = None) -> ConsistencyJudge:
    """As `make_http_judge`, for P in {0, 0.5, 1} of the evaluation variant (paper section 3)."""
    ask_all = _make(config, stats or JudgeStats())

    def judge(requests: Sequence[ConsistencyRequest]) -> list[Verdict]:
        return ask_all([consistency_prompt(r.payoff, r.analyze) for r in requests])

    return judge


def _make(config: HttpJudgeConfig, stats: JudgeStats) -> Callable[[Sequence[Prompt]], list[Verdict]]:
    key = _check_runnable(config)
    cache = TextCache(config.cache_dir) if config.cache_dir else None
    endpoints = Endpoints(len(config.endpoints), config.skip_after, config.skip_s)
    limits = PoolConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(PoolConfig)})
    sampling, connect = _sampling(config), _connect(config, key)

    def ask_all(prompts: Sequence[Prompt]) -> list[Verdict]:
        started = time.monotonic()
        keys = [prompt_key(prompt, sampling) for prompt in prompts]
        known = _cached(dict(zip(keys, prompts, strict=True)), cache)
        fresh = {k: p for k, p in zip(keys, prompts, strict=True) if k not in known}
        asked = list(fresh)
        found = (lambda place, text: cache.put(asked[place], text)) if cache else lambda place, text: None
        answers = judge_all(list(fresh.values()), connect, endpoints, limits, stats, found)
        verdicts = known | dict(zip(asked, answers, strict=True))
        stats.add("calls")
        stats.add("call_s", time.monotonic() - started)
        stats.add("requests", len(keys))
        stats.add("asked", len(asked))
        stats.add("cache_hits", len(known))
        stats.add("repeated", len(keys) - len(set(keys)))
        stats.add("missing", sum(verdicts[k].score is None for k in keys))
        stats.add("scored", sum(verdicts[k].score is not None for k in keys))
        stats.peak("cache_errors", cache.errors if cache else 0)
        return [verdicts[k] for k in keys]

    return ask_all


def _cached(prompts: Mapping[str, Prompt], cache: TextCache | None) -> dict[str, Verdict]:
    """Verdicts of the stored texts, read anew: a text that no longer reads as one is asked again."""
    texts = {key: cache.get(key) for key in prompts} if cache else {}
    read = {key: read_on_scale(text, prompts[key].scale) for key, text in texts.items() if text is not None}
    return {key: dataclasses.replace(v, reason="cached") for key, v in read.items() if v.score is not None}


def _sampling(config: HttpJudgeConfig) -> dict[str, Any]:
    """The request's fields beside its messages; in this form they are part of a cache's keys."""
    fields = {name: getattr(config, name) for name in ("model", "temperature", "top_p", "max_tokens")}
    if config.extra_body:
        template = {"enable_thinking": config.thinking}
        fields["extra_body"] = {"top_k": config.top_k, "chat_template_kwargs": template}
    return fields


def _connect(config: HttpJudgeConfig, key: str) -> Connect:
    trust = ssl.create_default_context()
    open_one = lambda url: open_client(url, key, config.concurrency, config.timeout_s, trust)
    count = math.ceil(config.concurrency / _CONNECTIONS)

    @contextlib.asynccontextmanager
    async def connect():
        async with contextlib.AsyncExitStack() as stack:
            asks = []
            for url in config.endpoints:
                clients = [await stack.enter_async_context(open_one(url)) for _ in range(count)]
                asks.append(_asker(clients, _sampling(config), config.timeout_s))
            yield asks

    return connect


def _asker(clients: Sequence[openai.AsyncOpenAI], sampling: Mapping[str, Any], seconds: float) -> Ask:
    turns = itertools.cycle(clients)
    fields = {name: value for name, value in sampling.items() if name != "extra_body"}
    fields |= sampling.get("extra_body", {})

    async def ask(prompt: Prompt) -> Reply:
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        body = {"messages": messages, **fields}
        return _reply(await post(next(turns), "/chat/completions", body, seconds))

    return ask


def _reply(body: Any) -> Reply:
    """The text and token counts of a chat completion; raises AttemptFailed when it has another shape."""
    try:
        choice = body["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise AttemptFailed("no_answer", "the server's answer has no choices[0].message.content") from error
    cut_off = choice.get("finish_reason") == "length"
    if not isinstance(text, str):
        if cut_off and text is None:  # all tokens went into the reasoning, which the server keeps apart
            text = ""
        else:
            raise AttemptFailed("no_answer", "the server's answer holds no text")
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    tokens = [_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    return Reply(text, *tokens, cut_off=cut_off)


def _count(value: Any) -> int:
    """A token count, 0 where the server sent something else."""
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0


def _check_runnable(config: HttpJudgeConfig) -> str:
    """The API key, once the config is known to be able to work."""
    if not config.endpoints:
        raise UserError("judge.endpoints is empty: name at least one URL, such as http://host:8000/v1")
    if not config.model:
        raise UserError("judge.model is empty: name the model as the server lists it under /v1/models")
    key = api_key(config.api_key_env, "judge.api_key_env")
    need, open_files = config.concurrency + 64, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if open_files != resource.RLIM_INFINITY and open_files < need:
        raise UserError(
            f"judge.concurrency={config.concurrency} needs {need} open files, this process may open "
            f"{open_files}: run `ulimit -n {need}` first, or lower it"
        )
    return key
