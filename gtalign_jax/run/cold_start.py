"""Who writes cold-start chains, and how many of which the best is kept: the section `config.synthesis`."""

import dataclasses

from gtalign_jax.errors import INF, MAX_COUNT, in_range
from gtalign_jax.remote.client import check_key_name, check_numbers, check_urls
from gtalign_jax.remote.pool import PoolConfig

TRUTHS, SERVER, ENGINE = "truths", "server", "engine"
KINDS = (TRUTHS, SERVER, ENGINE)
TEACHER, SOLVER = "teacher", "solver"
_POOL = ("in_flight", "tries", "timeout_s", "call_timeout_s", "wait_s", "max_wait_s", "patience_s")
_EXAMPLE = "http://host:8000/v1"


def _check_teacher(name: str) -> None:
    if name not in KINDS and ":" not in name:
        raise ValueError(f"teacher={name!r}: must be one of {', '.join(KINDS)}, or module:function")


@dataclasses.dataclass(frozen=True)
class ComponentConfig:
    """One component of a chain. teacher, model, endpoints: as in `SynthesisConfig`, whose hold where they
    are empty. max_tokens: of a model's answer; one that is cut there is made again."""

    teacher: str = ""
    model: str = ""
    endpoints: tuple[str, ...] = ()
    max_tokens: int = 512

    def __post_init__(self) -> None:
        in_range(self, max_tokens=(1, MAX_COUNT))
        _check_teacher(self.teacher or TRUTHS)
        check_urls(self.endpoints, "endpoints", _EXAMPLE)


@dataclasses.dataclass(frozen=True)
class SynthesisConfig:
    """Chains made component by component: thinking, matrix, analysis and response, each from those before.
    Of `candidates` chains of a prompt the one of the highest welfare is kept (docs/synthesis.md).

    teacher: `truths` (made of what the data store), `server` (OpenAI-compatible: model is the name that the
    endpoints know it by), `engine` (our own: model is a folder), or module:function, `Ask` → text.
    thinking, matrix, analysis, response: where a component has a teacher of its own.
    analyze: who writes <analyze>: its `teacher`, held to what the matrix says, or the `solver`. attempts: how
    often a component is made before its candidate is given up. split: of the data, `train` or `test`.
    temperature, top_p: of models. response_words: of the longest response that `truths` writes (0: any).
    at_once: prompts between two records on disk.
    in_flight, tries, timeout_s, call_timeout_s, wait_s, max_wait_s, patience_s: of requests to servers, as in
    `remote.pool.PoolConfig`; patience_s outlives a server that starts again. api_key_env: environment
    variable with the key, empty for none. price_in, price_out: of a million tokens, for the report.
    """

    teacher: str = TRUTHS
    model: str = ""
    endpoints: tuple[str, ...] = ()
    thinking: ComponentConfig = ComponentConfig()
    matrix: ComponentConfig = ComponentConfig()
    analysis: ComponentConfig = ComponentConfig()
    response: ComponentConfig = ComponentConfig(max_tokens=2048)
    candidates: int = 9
    analyze: str = TEACHER
    attempts: int = 3
    split: str = "train"
    temperature: float = 1.0
    top_p: float = 1.0
    response_words: int = 0
    at_once: int = 32
    in_flight: int = 64
    tries: int = 3
    timeout_s: float = 600.0
    call_timeout_s: float = 86400.0
    wait_s: float = 0.5
    max_wait_s: float = 20.0
    patience_s: float = 600.0
    api_key_env: str = ""
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self) -> None:
        counts = ("candidates", "attempts", "at_once", "in_flight", "tries")
        in_range(self, **dict.fromkeys(counts, (1, MAX_COUNT)))
        in_range(self, response_words=(0, MAX_COUNT), temperature=(0, INF), top_p=(0, 1))
        in_range(self, price_in=(0, INF), price_out=(0, INF))
        times = {name: (0.0, True) for name in ("wait_s", "max_wait_s", "patience_s")}
        check_numbers(self, times | {name: (0.0, False) for name in ("timeout_s", "call_timeout_s", "top_p")})
        _check_teacher(self.teacher)
        for name, known in (("analyze", (TEACHER, SOLVER)), ("split", ("train", "test"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {' or '.join(known)}")
        check_urls(self.endpoints, "endpoints", _EXAMPLE)
        check_key_name(self.api_key_env, "api_key_env")

    def component(self, name: str) -> ComponentConfig:
        """A component's own settings, those of all where it has none; a model is of one kind of teacher."""
        own: ComponentConfig = getattr(self, name)
        same = own.teacher in ("", self.teacher)
        return dataclasses.replace(
            own,
            teacher=own.teacher or self.teacher,
            model=own.model or (self.model if same else ""),
            endpoints=own.endpoints or self.endpoints,
        )

    @property
    def pool(self) -> PoolConfig:
        """How servers are asked."""
        return PoolConfig(**{name: getattr(self, name) for name in _POOL})
