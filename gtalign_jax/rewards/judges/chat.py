"""What a chat server is asked for a verdict, and how its answer is read. Pure functions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gtalign_jax.remote.client import AttemptFailed
from gtalign_jax.rewards.judges.rubrics import Prompt
from gtalign_jax.rewards.judges.verdict import read_on_scale
from gtalign_jax.rewards.scale import Scale

PATH = "/chat/completions"


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a server answered. cut_off: it ran into its token limit."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    cut_off: bool = False


def chat_body(prompt: Prompt, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The request for one verdict. sampling: model and sampling fields; those of `extra_body` stand beside
    the others, as the OpenAI client would send them."""
    messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
    fields = {name: value for name, value in sampling.items() if name != "extra_body"}
    return {"messages": messages} | fields | sampling.get("extra_body", {})


def read_reply(body: Any) -> Reply:
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
    sent, written = (_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    return Reply(text, sent, written, cut_off)


def _count(value: Any) -> int:
    """A token count, 0 where the server sent something else."""
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0


def read_score(reply: Reply, scale: Scale) -> float:
    """The score in a reply; AttemptFailed, which is not the server's fault, when there is none."""
    verdict = read_on_scale(reply.text, scale)
    if verdict.score is None:
        kind = "cut_off" if reply.cut_off else "no_verdict"
        reason = f"{verdict.reason} (it was cut off at max_tokens)" if reply.cut_off else verdict.reason
        raise AttemptFailed(kind, reason, blame=False)
    return verdict.score
