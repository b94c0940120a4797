"""What clients may ask for: an `Ask`; and what they are told instead: an `ApiError`."""

import dataclasses
from typing import Any

from gtalign_jax.chain.matrix import Row
from gtalign_jax.game.pricing import STEP, TYPICAL, Amounts
from gtalign_jax.serving.server.text import SHOWN
from gtalign_jax.serving.splice import AGAIN, ERROR, GRAMMAR, MODEL, TRIES, UNSTEERED

Messages = tuple[dict[str, str], ...]
Prompt = str | tuple[int, ...] | Messages


class ApiError(Exception):
    """An answer that is an error. status: HTTP's. param: the field at fault. retry_s: when to come again."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_s: int = 0,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code, self.retry_s = code, retry_s

    def body(self) -> dict[str, Any]:
        """The JSON that the protocol's clients read."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Pricing:
    """Who pays and how much: a policy of `game.pricing`, its price, and what actions write.

    matrix: what the price is put on in place of the matrix that the model writes; None for that one. step: of
    the edited payoffs.
    """

    policy: str
    price: float
    amounts: Amounts = TYPICAL
    matrix: Row | None = None
    step: float = STEP


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing: of a key, or of the server. unusable: None, the server's."""

    pricing: Pricing | None = None
    analyze: str = MODEL
    reasoning: str = SHOWN
    unusable: str | None = None


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The most that one request may ask for, and what its prices are for.

    unusable: what may become of a matrix that cannot be read; the first, where nobody says. step: what edited
    payoffs are rounded to, as finely as the model was taught to read.
    """

    tokens: int
    choices: int
    policies: tuple[str, ...]
    amounts: Amounts = TYPICAL
    unusable: tuple[str, ...] = (UNSTEERED, AGAIN, ERROR)
    step: float = STEP


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request.

    prompts: each answered n times. max_tokens: None for all there is room for. go_on: the last message is the
    beginning of the answer. usage: streamed too. logprobs: of the tokens written, and of the `top` likeliest
    beside each. echo: the prompt stands before its answer, in text and log-probabilities.
    """

    chat: bool
    prompts: tuple[Prompt, ...]
    model: str | None = None
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    go_on: bool = False
    usage: bool = False
    logprobs: bool = False
    top: int = 0
    echo: bool = False
    pricing: Pricing | None = None
    analyze: str = MODEL
    reasoning: str = SHOWN
    unusable: str = UNSTEERED

    @property
    def tries(self) -> int:
        """First passes that a priced answer may take; a greedy second one would be the first again."""
        again = self.unusable == GRAMMAR or (self.unusable == AGAIN and self.temperature > 0)
        return TRIES if again else 1
