"""A teacher behind OpenAI-compatible servers. What they answered is kept, so that nothing is bought twice."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gtalign_jax.errors import UserError
from gtalign_jax.remote.client import AttemptFailed
from gtalign_jax.remote.pool import LATE, Answer, Call, Failed, Pool, post_all
from gtalign_jax.rewards.judges import chat
from gtalign_jax.rewards.judges.cache import TextCache
from gtalign_jax.synthesis.ask import CUT, Ask, Made
from gtalign_jax.synthesis.prompts import messages_for

# Ends of a request that say nothing of the prompt: the servers are down, busy or late.
_PASSING = ("connection", "timeout", LATE, "http_408", "http_425", "http_429", "http_5")


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """pool: the servers. body: a request's fields beside messages and seed. cache: answers so far (None: none
    are kept)."""

    pool: Pool
    body: Mapping[str, Any]
    cache: TextCache | None


def make(served: Served, asks: Sequence[Ask]) -> list[Made]:
    """The servers' texts. UserError when one is away, busy or late beyond all patience: nothing is lost, and
    no candidate is given up for it."""
    bodies = [{**served.body, "messages": messages_for(ask), "seed": ask.seed} for ask in asks]
    keys = [hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() for body in bodies]
    known = {key: made for key in keys if (made := _kept(served, key)) is not None}
    fresh = {key: body for key, body in zip(keys, bodies, strict=True) if key not in known}
    calls = [Call(chat.PATH, body, functools.partial(_read, served, key)) for key, body in fresh.items()]
    for key, result in zip(fresh, post_all(served.pool, calls), strict=True):
        known[key] = _given_up(result) if isinstance(result, Failed) else result
    return [known[key] for key in keys]


def _read(served: Served, key: str, answer: Answer) -> Made:
    reply = chat.read_reply(answer.json)
    if not reply.cut_off and not reply.text.strip():
        raise AttemptFailed("empty", "the server's answer is empty", blame=False)
    text, reason = (None, CUT) if reply.cut_off else (reply.text, "")
    made = Made(text, reason, reply.tokens_in, reply.tokens_out)
    if served.cache is not None:
        served.cache.put(key, json.dumps(dataclasses.asdict(made)))
    return made


def _kept(served: Served, key: str) -> Made | None:
    """The answer that was stored under a key; what cannot be read is asked again."""
    text = served.cache.get(key) if served.cache else None
    try:
        return None if text is None else Made(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _given_up(failed: Failed) -> Made:
    """What a request without an answer means for its candidate."""
    if failed.kind.startswith(_PASSING):
        raise UserError(
            f"config.synthesis.endpoints: {failed}; nothing is lost, the same command goes on when it is back"
        )
    if failed.retry == "elsewhere":
        raise UserError(
            f"config.synthesis: {failed}; see endpoints, model and api_key_env of config.synthesis"
        )
    return Made(None, f"{failed.kind} ({failed.reason})")
