"""A judge behind any OpenAI-compatible server: `make_http_judge(config)` is a `Judge`.

Server trouble becomes `Verdict(None, reason)`; only a mistake in the config raises: at once, or when the
servers refuse all that they are asked for a reason that will not pass.
"""

import contextlib
import dataclasses
import functools
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gtalign_jax.errors import UserError
from gtalign_jax.remote.client import AttemptFailed, api_key, check_key_name, check_numbers, check_urls
from gtalign_jax.remote.counters import Counters
from gtalign_jax.remote.pool import LATE, Answer, Call, Failed, Pool, PoolConfig, post_all
from gtalign_jax.remote.turns import Turns
from gtalign_jax.rewards.judges import chat
from gtalign_jax.rewards.judges.base import (
    ConsistencyJudge,
    ConsistencyRequest,
    Judge,
    JudgeRequest,
    Verdict,
)
from gtalign_jax.rewards.judges.cache import TextCache, prompt_key
from gtalign_jax.rewards.judges.rubrics import Prompt, consistency_prompt, judge_prompt
from gtalign_jax.rewards.judges.verdict import read_on_scale
from gtalign_jax.rewards.scale import Scale
from gtalign_jax.rewards.tasks import TASKS
from gtalign_jax.rewards.tasks.task import Tasks

_FEW = 8
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

    def __post_init__(self) -> None:
        check_numbers(self, _AT_LEAST)
        if self.top_p > 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1]")
        check_key_name(self.api_key_env, "api_key_env")
        check_urls(self.endpoints, "endpoints", "http://host:8000/v1")


def make_http_judge(config: HttpJudgeConfig, stats: Counters | None = None, tasks: Tasks = TASKS) -> Judge:
    """A judge over HTTP: `judge(requests) -> verdicts`, in order, from any thread.

    stats: where this judge counts (docs/judges.md); read it with `stats.numbers()`. tasks: the run's.
    Equal requests in a call are asked once. Raises UserError on a config that cannot work; a call raises it
    when all its requests were refused and no other try could help (a wrong key, model or path).
    """
    opened = _open(config, stats or Counters())

    def judge(requests: Sequence[JudgeRequest]) -> list[Verdict]:
        return _judge_all(opened, [judge_prompt(request, tasks) for request in requests])

    return judge


def make_http_consistency_judge(config: HttpJudgeConfig, stats: Counters | None = None) -> ConsistencyJudge:
    """As `make_http_judge`, for P in {0, 0.5, 1} of the evaluation variant (paper section 3)."""
    opened = _open(config, stats or Counters())

    def judge(requests: Sequence[ConsistencyRequest]) -> list[Verdict]:
        return _judge_all(opened, [consistency_prompt(r.payoff, r.analyze) for r in requests])

    return judge


@dataclasses.dataclass(frozen=True, eq=False)
class _HttpJudge:
    """A judge that is ready. sampling: the request's fields beside its messages."""

    pool: Pool
    sampling: Mapping[str, Any]
    cache: TextCache | None


def _open(config: HttpJudgeConfig, stats: Counters) -> _HttpJudge:
    key = _check_runnable(config)
    cache = TextCache(config.cache_dir) if config.cache_dir else None
    turns = Turns(len(config.endpoints), config.skip_after, config.skip_s)
    limits = PoolConfig(
        in_flight=config.concurrency,
        tries=config.tries,
        timeout_s=config.timeout_s,
        call_timeout_s=config.call_timeout_s,
        wait_s=config.wait_s,
        max_wait_s=config.max_wait_s,
    )
    watch = functools.partial(_watched, stats)
    pool = Pool(tuple(config.endpoints), limits, turns, stats, key, watch)
    return _HttpJudge(pool, _sampling(config), cache)


def _judge_all(judge: _HttpJudge, prompts: Sequence[Prompt]) -> list[Verdict]:
    """One verdict a prompt, in order; equal prompts are asked once."""
    started = time.monotonic()
    keys = [prompt_key(prompt, judge.sampling) for prompt in prompts]
    known = _cached(dict(zip(keys, prompts, strict=True)), judge.cache)
    fresh = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
    calls = [_call(judge, key, prompt) for key, prompt in fresh.items()]
    results = post_all(judge.pool, calls)
    _check_not_refused(results)
    asked = {key: _verdict(judge, result) for key, result in zip(fresh, results, strict=True)}
    verdicts = known | asked
    stats = judge.pool.counters
    if late := sum(isinstance(result, Failed) and result.kind == LATE for result in results):
        stats.add(f"failed/{LATE}", late)
    stats.add("calls")
    stats.add("call_s", time.monotonic() - started)
    stats.add("requests", len(keys))
    stats.add("asked", len(asked))
    stats.add("cache_hits", len(known))
    stats.add("repeated", len(keys) - len(set(keys)))
    stats.add("missing", sum(verdicts[key].score is None for key in keys))
    stats.add("scored", sum(verdicts[key].score is not None for key in keys))
    stats.peak("cache_errors", judge.cache.errors if judge.cache else 0)
    return [verdicts[key] for key in keys]


def _check_not_refused(results: Sequence[Verdict | Failed]) -> None:
    """UserError when all was refused for good: nothing would be judged to the end of the run.

    What is refused for its own sake (`http 400` for a prompt that is too long) needs to be more than a few.
    """
    refused = [r for r in results if isinstance(r, Failed) and r.retry != "again"]
    if not refused or len(refused) < len(results):
        return
    if len(refused) >= _FEW or all(r.retry == "elsewhere" for r in refused):
        raise UserError(
            f"config.judge: all {len(refused)} requests were refused ({refused[0]}); "
            "see config.judge.endpoints, model, extra_body and api_key_env"
        )


def _call(judge: _HttpJudge, key: str, prompt: Prompt) -> Call:
    read = functools.partial(_read, judge, key, prompt.scale)
    return Call(chat.PATH, chat.chat_body(prompt, judge.sampling), read)


def _read(judge: _HttpJudge, key: str, scale: Scale, answer: Answer) -> Verdict:
    """The verdict of an answer, counted and stored under its key; AttemptFailed where there is none."""
    reply, stats = chat.read_reply(answer.json), judge.pool.counters
    stats.add("answers")
    stats.add("tokens_in", reply.tokens_in)
    stats.add("tokens_out", reply.tokens_out)
    stats.add("answer_s", answer.seconds)
    stats.peak("max_answer_s", answer.seconds)
    score = chat.read_score(reply, scale)
    if judge.cache is not None:
        judge.cache.put(key, reply.text)
    return Verdict(score, "", answer.call_seconds)


def _verdict(judge: _HttpJudge, result: Verdict | Failed) -> Verdict:
    if isinstance(result, Verdict):
        return result
    if result.kind == LATE:
        limit = judge.pool.config.call_timeout_s
        return Verdict(None, f"not judged within call_timeout_s={limit:g}")
    return Verdict(None, result.reason, result.seconds)


@contextlib.contextmanager
def _watched(stats: Counters) -> Iterator[None]:
    """One attempt: how many are under way together, and how it failed."""
    with stats.at_once("max_in_flight"):
        try:
            yield
        except AttemptFailed as failure:
            stats.add(f"failed/{failure.kind}")
            raise


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


def _check_runnable(config: HttpJudgeConfig) -> str:
    """The API key, once the config is known to be able to work."""
    if not config.endpoints:
        raise UserError("config.judge.endpoints is empty: name at least one URL, such as http://host:8000/v1")
    if not config.model:
        raise UserError("config.judge.model is empty: name the model as the server lists it under /v1/models")
    key = api_key(config.api_key_env, "config.judge.api_key_env")
    need, open_files = config.concurrency + 64, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if open_files != resource.RLIM_INFINITY and open_files < need:
        raise UserError(
            f"config.judge.concurrency={config.concurrency} needs {need} open files, this process may open "
            f"{open_files}: run `ulimit -n {need}` first, or lower it"
        )
    return key
