"""One request to an OpenAI-compatible server, and what the config of such servers is held to.

A request ends as the JSON of an answer, or as `AttemptFailed`: a name to count by, the reason, and whether
another try may help. The client itself tries once (`max_retries`), because the next try goes to another
server where there is one: that is for `remote.pool`.
"""

import asyncio
import json
import os
import re
import ssl
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import openai

from gtalign_jax.errors import UserError, naming, numeric

NO_KEY = "none"  # what is sent where no key is asked for


class AttemptFailed(Exception):
    """One attempt gave no answer.

    kind: a short name to count by. reason: one line. retry: `again` (another try may help), `elsewhere`
    (only at another server) or `never` (the request is at fault). blame: whether the server is.
    pause_s: the server asked to be left alone so long.
    """

    def __init__(
        self, kind: str, reason: str, retry: str = "again", blame: bool = True, pause_s: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.retry = kind, reason, retry
        self.blame, self.pause_s = blame, pause_s


def open_client(
    url: str, api_key: str, connections: int, timeout_s: float, trust: ssl.SSLContext
) -> openai.AsyncOpenAI:
    """A client that tries once. trust: made once for many, because it takes longer than all else."""
    # The client's own type: which HTTP library it stands on differs between its versions.
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
        max_connections=connections, max_keepalive_connections=connections
    )
    timeout = openai.Timeout(timeout_s, connect=min(timeout_s, 30.0))
    http = openai.DefaultAsyncHttpxClient(limits=limits, timeout=timeout, verify=trust)
    return openai.AsyncOpenAI(api_key=api_key, base_url=url, max_retries=0, http_client=http)


async def post(client: openai.AsyncOpenAI, path: str, body: Mapping[str, Any], seconds: float) -> Any:
    """The JSON of the server's answer, None for an empty one; AttemptFailed for any other end.

    seconds bound the whole attempt: a server that drips bytes never trips a socket's own limit.
    """
    try:
        async with asyncio.timeout(seconds):
            # Read here, not by the client: it returns unchecked objects for JSON of another shape.
            text = await client.post(path, cast_to=str, body=dict(body))
        return json.loads(text) if text else None
    except TimeoutError as error:
        raise AttemptFailed("timeout", f"timeout: no answer in {seconds:g} s") from error
    except openai.APIStatusError as error:
        raise _status_failure(error.response, client.api_key) from error
    except openai.APITimeoutError as error:
        raise AttemptFailed("timeout", "timeout: the server did not respond") from error
    except openai.OpenAIError as error:
        cause = type(error.__cause__ or error).__name__
        raise AttemptFailed("connection", f"connection failed ({cause})") from error
    except (ValueError, RecursionError) as error:
        raise AttemptFailed("bad_json", "the server's answer is not JSON") from error


def redacted(text: str, secrets: Sequence[str]) -> str:
    """The text with `***` in place of every secret, as it is and as JSON would write it."""
    for secret in sorted({s for key in secrets for s in (key, json.dumps(key)[1:-1])}, key=len, reverse=True):
        if secret and secret != NO_KEY:
            text = text.replace(secret, "***")
    return text


def redacted_url(url: str) -> str:
    """The URL with `***` in place of a user name, a password and a query; any other text unchanged."""
    url = re.sub(r"^(\s*\w+://)?.*@", r"\1***@", url, flags=re.DOTALL)
    return re.sub(r"[?#].*$", "?***", url, flags=re.DOTALL)


def redacted_value(value: Any) -> Any:
    """A JSON value of a config with its URLs redacted, for those that were recorded with credentials."""
    if isinstance(value, list | tuple):
        return [redacted_value(one) for one in value]
    return redacted_url(value) if isinstance(value, str) and re.match(r"https?://", value) else value


def _status_failure(response: Any, key: str) -> AttemptFailed:
    status = response.status_code
    said = redacted(" ".join(response.text.split()), [key])[:240]
    kind, reason = f"http_{status}", f"http {status}" + (f": {said}" if said else "")
    if status in (408, 409, 425, 429) or status >= 500:
        return AttemptFailed(kind, reason, blame=status != 429, pause_s=_retry_after(response))
    if status in (401, 403, 404, 405):  # the key, the model or the path: another server may do
        return AttemptFailed(kind, reason, retry="elsewhere")
    return AttemptFailed(kind, reason, retry="never", blame=False)


def _retry_after(response: Any) -> float:
    """Seconds of a Retry-After header; 0 when it is absent, a date or nonsense."""
    try:
        seconds = float(response.headers.get("retry-after", "0"))
    except ValueError:
        return 0.0
    return seconds if 0 < seconds < 86400 else 0.0


def check_numbers(config: Any, least: Mapping[str, tuple[float, bool]]) -> None:
    """ValueError for fields out of bounds. least: field → (smallest value, whether it may be that value)."""
    for name, (smallest, itself) in least.items():
        value = getattr(config, name)
        numeric(config, name, value)
        if not (value >= smallest if itself else value > smallest) or value == float("inf"):
            bound = f"at least {smallest}" if itself else f"above {smallest}"
            raise ValueError(f"{name}={value}: must be a finite number {bound}")


def check_urls(urls: Sequence[str], field: str, example: str) -> None:
    """ValueError for what is no tuple of http(s) URLs, or holds credentials, which no message repeats.

    example: one to name in the message.
    """
    if isinstance(urls, str):
        raise ValueError(f"{field}={redacted_url(urls)!r}: must be a list of URLs, ({example!r},)")
    for url in urls:
        shown = redacted_url(url) if isinstance(url, str) else url
        try:
            parts = urllib.parse.urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            good = good and url.isprintable() and " " not in url
        except (AttributeError, TypeError, ValueError):
            good = False
        if not good:
            raise ValueError(f"{field}: {shown!r} is no http(s) URL; write {example}")
        if "@" in parts.netloc or parts.query or parts.fragment:  # config.json would show it to all
            raise ValueError(
                f"{field}: {shown!r} holds more than host and path; put the key in an environment variable "
                "and its name in api_key_env"
            )


def check_key_name(variable: str, field: str) -> None:
    """ValueError for what is no name of an environment variable, perhaps the key itself: not shown."""
    if variable and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise ValueError(f"{field}: no name of an environment variable; put the key in one and name that")


def api_key(variable: str, field: str) -> str:
    """The key in an environment variable; a word that stands for none when no variable is named."""
    if not variable:
        return NO_KEY
    with naming(""):
        check_key_name(variable, field)
    key = os.environ.get(variable)
    if not key:
        raise UserError(f"{field}={variable}: this environment variable is not set")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{field}={variable}: its key has a space, a line break or a letter beyond ASCII")
    return key
