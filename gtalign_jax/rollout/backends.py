"""What each kind of inference server is asked for completions, and how its answer is read. Pure functions.

    vllm     POST /v1/completions with the token fields that vLLM adds   reload: /collective_rpc
    sglang   POST /generate, one sample a request                        reload: /update_weights_from_disk
    openai   POST /v1/completions with standard fields only              no reload

An answer is taken whole or not at all: token ids, a log-probability for each, and the end that training
needs. Ids come from `token_ids`, from tokens written as `token_id:N`, or from token texts where every one
of them belongs to exactly one id.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gtalign_jax.errors import UserError
from gtalign_jax.remote.client import AttemptFailed
from gtalign_jax.remote.pool import Answer, Call, Failed
from gtalign_jax.rollout.sampling import SamplingConfig

KINDS = ("vllm", "sglang", "openai")
_FILTERS = {"repetition_penalty": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # and their values when off
_ID_TOKEN = "token_id:"
# Rounding may lift the log-probability of a sure token above zero by a hair.
_ABOVE_ZERO = 1e-3


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sample: token ids, their log-probabilities, and whether it ended by itself."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


@dataclasses.dataclass(frozen=True)
class CompletionTerms:
    """What all requests of a rollout share.

    model: the name the server knows it by. eos_ids: tokens that end a row. stops: texts that do.
    text_ids: () -> text of a token → its ids, called only for a server that sends texts alone.
    """

    kind: str
    model: str
    sampling: SamplingConfig
    max_tokens: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    stops: tuple[str, ...]
    text_ids: Callable[[], Mapping[str, Sequence[int]]]


def completion_call(terms: CompletionTerms, prompt: Sequence[int], count: int, seed: int) -> Call:
    """The request for `count` samples of a prompt; its answer is read as a list of `Completion`."""
    prompt = [int(i) for i in prompt]
    if terms.kind == "sglang":
        body = _sglang_body(terms, prompt, seed)
        return Call("/generate", body, lambda answer: [_check(terms, _read_sglang(answer.json))])
    body = _openai_body(terms, prompt, count, seed)
    return Call("/v1/completions", body, lambda answer: _read_choices(terms, answer.json, prompt, count))


def check_sampling(kind: str, sampling: SamplingConfig) -> None:
    """ValueError for settings under which this kind of server draws from another distribution than ours, or
    reports log-probabilities of another.

    vLLM applies min-p before top-k and top-p: with top-k that is the same, with top-p it is not. SGLang's
    log-probabilities are those before any filter, and it penalises repetition of the completion alone.
    """
    used = {name: getattr(sampling, name) for name, off in _FILTERS.items() if getattr(sampling, name) != off}
    foreign = [name for name in used if name != "top_p"]
    if kind == "openai" and foreign:
        raise ValueError(f"sampling.{foreign[0]}: not in the OpenAI protocol; use config.engine.kind=vllm")
    if sampling.greedy:  # without filters
        used = {name: value for name, value in used.items() if name == "repetition_penalty"}
    if kind == "sglang" and used:
        name, value = next(iter(used.items()))
        raise ValueError(
            f"sampling.{name}={value:g}: SGLang reports log-probabilities of another distribution; switch it "
            "off, or use config.engine.kind=vllm or embedded"
        )
    if kind == "vllm" and {"min_p", "top_p"} <= used.keys():
        raise ValueError(
            f"sampling.min_p={sampling.min_p:g}: vLLM applies it before top_p, our own engine after it; "
            "switch one of them off, or use config.engine.kind=embedded"
        )


def one_by_one(kind: str, sampling: SamplingConfig) -> bool:
    """Whether the samples of a group are requests of their own: SGLang gives a request one seed, and vLLM
    refuses several greedy samples."""
    return kind == "sglang" or sampling.greedy


def reload_calls(kind: str, folder: str) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    """(ways to load the weights in `folder`, of which the first counts that the server knows; what to ask it
    then)."""
    if kind == "vllm":
        # A vLLM that does not know weights_path reads the folder it was started from.
        reload = {"method": "reload_weights"}
        ways = (reload | {"kwargs": {"weights_path": folder}}, reload)
        forget = Call("/reset_prefix_cache", {}, _not_refused)  # what is cached belongs to the old weights
        return tuple(Call("/collective_rpc", body, _not_refused) for body in ways), (forget,)
    if kind == "sglang":
        return (Call("/update_weights_from_disk", {"model_path": folder}, _read_success),), ()
    raise UserError(f"config.engine.kind={kind!r}: such a server takes no new weights; use vllm or sglang")


def unknown_way(failed: Failed) -> bool:
    """Whether a server did not know this way to load weights; older vLLMs say only that they failed."""
    return "unexpected keyword" in failed.reason or failed.reason == "http 500: Internal Server Error"


def _openai_body(terms: CompletionTerms, prompt: list[int], count: int, seed: int) -> dict[str, Any]:
    sampling = terms.sampling
    body: dict[str, Any] = {
        "model": terms.model,
        "prompt": prompt,
        "n": count,
        "seed": seed,
        "max_tokens": terms.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "logprobs": 1,
    }
    if terms.stops:
        body["stop"] = list(terms.stops)
    if terms.kind == "openai":
        return body
    # All are said, because the server would else take the model folder's generation_config.json.
    return body | {
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(terms.eos_ids),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }


def _sglang_body(terms: CompletionTerms, prompt: list[int], seed: int) -> dict[str, Any]:
    sampling = terms.sampling
    params: dict[str, Any] = {
        "max_new_tokens": terms.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(terms.eos_ids),
        "sampling_seed": seed,
        "skip_special_tokens": False,
    }
    if terms.stops:
        params["stop"] = list(terms.stops)
    return {"input_ids": prompt, "sampling_params": params, "return_logprob": True}


def _read_choices(terms: CompletionTerms, answer: Any, prompt: list[int], count: int) -> list[Completion]:
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != count:
            raise _misfit(f"{len(choices)} samples instead of n={count}")
        found = [_check(terms, _read_choice(terms, choice, prompt)) for choice in choices]
        told = (answer.get("usage") or {}).get("completion_tokens")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _misfit(f"it has no usable choices ({type(error).__name__}: {error})") from error
    total = sum(len(c.ids) for c in found)
    if terms.kind == "vllm" and told is not None and told != total:
        raise _misfit(f"{total} tokens, but it counts {told}")
    return found


def _read_choice(
    terms: CompletionTerms, choice: Mapping[str, Any], prompt: list[int]
) -> tuple[list, list, str]:
    """(token ids, log-probabilities, finish reason) of a choice."""
    logprobs = choice.get("logprobs")
    if not logprobs:
        raise AttemptFailed(
            "no_logprobs",
            "the server sends no log-probabilities; use one that does (vLLM, SGLang)",
            retry="elsewhere",
            blame=False,
        )
    if choice.get("prompt_token_ids") not in (None, prompt):
        raise _misfit("the server changed the prompt's tokens")
    ids = choice.get("token_ids")
    if ids is None:
        ids = _ids_of_texts(terms, logprobs["tokens"])
    return ids, logprobs["token_logprobs"], choice["finish_reason"]


def _ids_of_texts(terms: CompletionTerms, texts: Sequence[str]) -> list[int]:
    """Ids of tokens given as `token_id:N` or as texts; AttemptFailed for a text of no id or several."""
    if all(text.startswith(_ID_TOKEN) for text in texts):
        return [int(text.removeprefix(_ID_TOKEN)) for text in texts]
    known, ids = terms.text_ids(), []
    for text in texts:
        same = known.get(text, ())
        if len(same) != 1:
            raise AttemptFailed(
                "no_token_ids",
                f"the server sends texts instead of token ids, and {text!r} stands for {len(same)} ids; use "
                "one that sends ids (vLLM, SGLang)",
                retry="elsewhere",
                blame=False,
            )
        ids.append(same[0])
    return ids


def _read_sglang(answer: Any) -> tuple[list, list, str]:
    try:
        meta = answer["meta_info"]
        pairs = meta.get("output_token_logprobs")
        reason = meta["finish_reason"]["type"]
        if pairs is None:
            raise AttemptFailed(
                "no_logprobs", "the server sends no output_token_logprobs", retry="elsewhere", blame=False
            )
        return [pair[1] for pair in pairs], [pair[0] for pair in pairs], reason
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _misfit(f"it has no usable meta_info ({type(error).__name__}: {error})") from error


def _check(terms: CompletionTerms, read: tuple[list, list, str]) -> Completion:
    """The sample, once its ids, log-probabilities, length and end fit together."""
    ids, logprobs, reason = read
    if not isinstance(ids, list) or not isinstance(logprobs, list) or len(ids) != len(logprobs):
        raise _misfit("token ids and log-probabilities are not as many")
    if not 0 < len(ids) <= terms.max_tokens:
        raise _misfit(f"{len(ids)} tokens; 1 to max_tokens={terms.max_tokens} were asked for")
    if not all(type(i) is int and 0 <= i < terms.vocab_size for i in ids):
        raise _misfit(f"a token id is not in [0, {terms.vocab_size}): another model?")
    if not all(isinstance(x, int | float) and math.isfinite(x) and x <= _ABOVE_ZERO for x in logprobs):
        raise _misfit("a log-probability is no finite number below zero")
    if reason not in ("stop", "length"):
        raise _misfit(f"the sample ended by {reason!r}")
    ended = ids[-1] in terms.eos_ids
    if reason == "length" and not ended and len(ids) < terms.max_tokens:
        raise AttemptFailed(
            "cut_short",
            f"the server stopped after {len(ids)} of {terms.max_tokens} tokens: start it with room for "
            "prompt and completion (vLLM: --max-model-len, SGLang: --context-length)",
            retry="elsewhere",
            blame=False,
        )
    if any(i in terms.eos_ids for i in ids[:-1]):
        raise _misfit("tokens follow an end token")
    if reason == "stop" and not ended and not terms.stops:
        raise AttemptFailed(
            "no_end_token",
            "the server leaves out the end token, which training needs; use one that sends it (vLLM, SGLang)",
            retry="elsewhere",
            blame=False,
        )
    return Completion(tuple(ids), tuple(min(float(x), 0.0) for x in logprobs), reason == "stop" or ended)


def _read_success(answer: Answer) -> bool:
    return _taken(answer.json)


def _not_refused(answer: Answer) -> bool:
    """For calls whose good answer has no fixed form."""
    return _taken({"success": True} | (answer.json if isinstance(answer.json, dict) else {}))


def _taken(said: Any) -> bool:
    if not isinstance(said, dict) or said.get("success") is not True:
        why = said.get("message") if isinstance(said, dict) else said
        raise AttemptFailed("reload", f"the weights were not taken: {why}")
    return True


def _misfit(what: str) -> AttemptFailed:
    return AttemptFailed("misfit", f"the answer does not fit: {what}")
