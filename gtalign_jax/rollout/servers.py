"""The inference servers of a run: their config, and what is known of them while it goes on."""

import dataclasses
from collections.abc import Mapping

from gtalign_jax.errors import UserError
from gtalign_jax.remote.client import api_key, check_key_name, check_numbers, check_urls
from gtalign_jax.remote.counters import Counters
from gtalign_jax.remote.pool import Call, Pool, PoolConfig
from gtalign_jax.remote.turns import Turns
from gtalign_jax.rollout.backends import KINDS

EMBEDDED = "embedded"
_AT_LEAST = {  # field → (smallest value, whether it may be that value)
    **{name: (1, True) for name in ("in_flight", "tries", "push_every")},
    **{name: (0, False) for name in ("timeout_s", "call_timeout_s")},
    **{name: (0, True) for name in ("wait_s", "max_wait_s", "patience_s", "rest_s")},
}


@dataclasses.dataclass(frozen=True)
class ServerConfig(PoolConfig):
    """Who generates. The fields of `PoolConfig`, and:

    rest_s: so long a server that failed is asked only when all others did too. kind: `embedded` (our own
    engine), `vllm`, `sglang` or `openai`. endpoints: URLs such as http://host:8000, with or without /v1; they
    share the work. model: the name the servers know it by. push_every: training steps between two hand-overs
    of the weights. api_key_env: environment variable with the key, empty for none.
    """

    patience_s: float = 300.0
    rest_s: float = 15.0
    kind: str = EMBEDDED
    endpoints: tuple[str, ...] = ()
    model: str = ""
    push_every: int = 1
    api_key_env: str = ""

    def __post_init__(self) -> None:
        if self.kind not in (EMBEDDED, *KINDS):
            raise ValueError(f"kind={self.kind!r}: use one of {', '.join((EMBEDDED, *KINDS))}")
        check_numbers(self, _AT_LEAST)
        check_key_name(self.api_key_env, "api_key_env")
        check_urls(self.endpoints, "endpoints", "http://host:8000")


class Given:
    """What the servers were last given. digest: of the weights, None for nothing yet or on another process.
    calls: what made each of them load the weights, by its place; those that did not are absent.
    """

    def __init__(self) -> None:
        self.digest: int | None = None
        self.calls: Mapping[int, Call] = {}

    def differs(self, digest: int) -> bool:
        """Whether these weights are others than the last; from now on they are the last."""
        before, self.digest = self.digest, digest
        return before not in (None, digest)


@dataclasses.dataclass(frozen=True, eq=False)
class Server:
    """Servers that hold the same model. pool: how they fare, and counters (`pool.numbers()`): requests,
    attempts, retries, failed, failed/KIND, tokens, pushes, unmoved (a push after which a server's answers
    were the same as before it).
    """

    config: ServerConfig
    pool: Pool
    given: Given


def connect(config: ServerConfig) -> Server:
    """The servers of a config; nothing is sent yet. UserError for a config that cannot work."""
    if config.kind == EMBEDDED:
        raise UserError("config.engine.kind='embedded' needs no server; use vllm, sglang or openai")
    if not config.endpoints:
        raise UserError("config.engine.endpoints is empty: name at least one, such as http://host:8000")
    if not config.model and config.kind != "sglang":
        raise UserError("config.engine.model is empty: name the model as the server lists it in /v1/models")
    key = api_key(config.api_key_env, "config.engine.api_key_env")
    roots = tuple(url.rstrip("/").removesuffix("/v1") for url in config.endpoints)
    given = Given()
    # One that was started again holds the weights it was started with.
    pool = dataclasses.replace(make_pool(roots, config, key), welcome=lambda i: given.calls.get(i))
    return Server(config, pool, given)


def make_pool(urls: tuple[str, ...], config: ServerConfig, key: str) -> Pool:
    """The least busy server is asked first, one that failed rests, what one refuses goes to the others."""
    turns = Turns(len(urls), 1, config.rest_s, least_busy=True)
    return Pool(urls, config, turns, Counters(), key, second_opinion=True)
