"""Rollouts from inference servers (vLLM, SGLang, any OpenAI-compatible one) in the place of our own engine.

    server   = servers.connect(config)
    generate = functools.partial(external.rollout, server)      the signature of `generate.rollout`
    push_weights(server, params, engine, folder)                HF export, then the servers' reload call

A sample whose request failed has length 0: no token of it is an action, so nothing is learnt from it, and
the caller drops it from its group. How far a server's log-probabilities are from the trainer's is measured
in every update (`sampler/gap`, `kl/sampler`) and corrected when `algorithm.is_cap` is set.
"""

import collections
import dataclasses
import logging
import pathlib
import zlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from gtalign_jax.errors import UserError, naming
from gtalign_jax.mesh import processes
from gtalign_jax.models import hf, lora
from gtalign_jax.remote.pool import Call, Failed, post_all
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.backends import (
    Completion,
    CompletionTerms,
    check_sampling,
    completion_call,
    one_by_one,
    reload_calls,
    unknown_way,
)
from gtalign_jax.rollout.buckets import bucket
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.request import Ending, Request
from gtalign_jax.rollout.sampling import GREEDY
from gtalign_jax.rollout.servers import Server, make_pool
from gtalign_jax.types import Completions, PromptBatch, PyTree, Rollout

log = logging.getLogger(__name__)

_PROBE_TOKENS = 8


def rollout(server: Server, engine: Engine, params: PyTree, request: Request) -> Rollout:
    """group_size completions of each prompt as `generate.rollout` gives them, host arrays, from a server.

    The engine lends its tokenizer, end tokens, sampling and buckets. params are not read: the server
    answers with the weights it was last given. stops: the texts of `ending`, told to the server so that
    it stops there; without them it writes on and the row is cut here. seeds [P, G] int32: default from
    (key, first_row + p) and g. Samples of failed requests have length 0 and are not finished, and the
    reasons are logged. Raises UserError when no request at all was answered, for a constraint, whose budget
    no server knows, and for sampling that the server does otherwise (`check_sampling`).
    """
    del params
    if request.constraint is not None:
        raise UserError(
            "config.engine.kind: no server can be told that a chain ends within the budget; use the embedded "
            "engine, or switch the grammar off"
        )
    with naming(""):
        check_sampling(server.config.kind, engine.sampling)
    request = request.replace(prompts=jax.device_get(request.prompts))
    seeds, ending = _seeds(request), request.ending
    if request.stops and ending is None:
        ending = engine_lib.make_ending(engine, request.stops)
    terms = _terms(server, engine, request, ending)
    whole_groups = request.seeds is None and not one_by_one(terms.kind, terms.sampling)
    answers = processes.all_gather(_completions(server, terms, request.prompts, seeds, whole_groups))
    rows: list[Completion | Failed] = sum(answers, [])
    _report(server, rows)
    return _to_rollout(engine, request, ending, rows)


def _completions(
    server: Server, terms: CompletionTerms, prompts: PromptBatch, seeds: np.ndarray, whole_groups: bool
) -> list[Completion | Failed]:
    """Row after row of this host's part of the prompts. whole_groups: a group is one request."""
    count, group_size = seeds.shape
    calls = []
    for p in range(count)[processes.part(count)]:
        ids = prompts.tokens[p, : prompts.length[p]]
        requests = [(group_size, seeds[p, 0])] if whole_groups else [(1, seed) for seed in seeds[p]]
        calls += [completion_call(terms, ids, n, int(seed)) for n, seed in requests]
    each = group_size if whole_groups else 1
    counters = server.pool.counters
    counters.add("requests", len(calls))
    rows: list[Completion | Failed] = []
    for answer in post_all(server.pool, calls):
        if isinstance(answer, Failed):
            counters.add("failed")
            counters.add(f"failed/{answer.kind}")
        rows += [answer] * each if isinstance(answer, Failed) else answer
    return rows


def _seeds(request: Request) -> np.ndarray:
    """[P, G] of 31 bits; a server that makes several samples of one seed adds their number to it too."""
    shape = (request.prompts.tokens.shape[0], request.group_size)
    if request.seeds is not None:
        seeds = np.asarray(request.seeds) & 0x7FFFFFFF
        if seeds.shape != shape:
            raise UserError(f"seeds: shape {seeds.shape}, needs {shape}, one a sample")
        return seeds
    words = [int(word) for word in np.asarray(jax.random.key_data(request.key)).reshape(-1)]
    rows = range(request.first_row, request.first_row + shape[0])
    draws = [np.random.default_rng([*words, row]).integers(2**31 - 2**16) for row in rows]
    return np.array(draws)[:, None] + np.arange(shape[1])


def _terms(server: Server, engine: Engine, request: Request, ending: Ending | None) -> CompletionTerms:
    eos = engine.eos_ids if ending is None else tuple(int(i) for i in np.asarray(ending.eos))

    def text_ids() -> Mapping[str, Sequence[int]]:
        found = collections.defaultdict(list)
        for i, text in enumerate(engine_lib.token_texts(engine)):
            found[text].append(i)
        return found

    return CompletionTerms(
        kind=server.config.kind,
        model=server.config.model,
        sampling=engine.sampling,
        max_tokens=request.max_new_tokens,
        vocab_size=engine.model_config.vocab_size,
        eos_ids=eos,
        stops=tuple(request.stops),
        text_ids=text_ids,
    )


def _report(server: Server, rows: Sequence[Completion | Failed]) -> None:
    """Count the tokens, log why samples are missing; UserError when all are."""
    reasons = collections.Counter(str(row) for row in rows if isinstance(row, Failed))
    server.pool.counters.add("tokens", sum(len(row.ids) for row in rows if isinstance(row, Completion)))
    if not reasons:
        return
    (reason, _), missing = reasons.most_common(1)[0], sum(reasons.values())
    if missing == len(rows):
        raise UserError(f"config.engine: none of {missing} samples came back ({reason})")
    log.warning("%d of %d samples are missing and dropped; most often: %s", missing, len(rows), reason)


def _to_rollout(
    engine: Engine, request: Request, ending: Ending | None, rows: Sequence[Completion | Failed]
) -> Rollout:
    """Rows p*G + g as arrays in the engine's buckets."""
    prompts = request.prompts
    count, slots = prompts.tokens.shape
    width = bucket(slots, engine.buckets.prompt, "prompt", "the longest prompt")
    budget = bucket(request.max_new_tokens, engine.buckets.completion, "completion", "max_new_tokens")
    tokens = np.zeros((count * request.group_size, budget), np.int32)
    logp = np.zeros(tokens.shape, np.float32)
    length, finished = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), bool)
    for i, row in enumerate(rows):
        if isinstance(row, Failed):
            continue
        n, stopped = _cut(row.ids, ending)
        tokens[i, :n], logp[i, :n] = row.ids[:n], row.logprobs[:n]
        length[i], finished[i] = n, stopped or row.finished
    shape = (count, request.group_size)
    length = length.reshape(shape)
    padded = np.pad(np.asarray(prompts.tokens), ((0, 0), (0, width - slots)))
    completions = Completions(
        tokens=tokens.reshape(*shape, budget),
        length=length,
        finished=finished.reshape(shape),
        logp=logp.reshape(*shape, budget),
        action_mask=np.arange(budget) < length[..., None],
    )
    return Rollout(PromptBatch(padded, np.asarray(prompts.length)), completions)


def _cut(ids: Sequence[int], ending: Ending | None) -> tuple[int, bool]:
    """(tokens up to the one that completes a stop string, whether there was one)."""
    if ending is None or ending.stop is None:
        return len(ids), False
    table, state = np.asarray(ending.stop), 0
    for n, i in enumerate(ids, 1):
        state = table[state, i]
        if state == len(table) - 1:
            return n, True
    return len(ids), False


def push_weights(server: Server, params: PyTree, engine: Engine, folder: pathlib.Path) -> int:
    """Write the model, adapters merged, as the HF folder `folder`, atomically, and have every server load it.

    The servers must see the same path; an older vLLM must have been started from it. Returns how many took
    the weights; the others get no more requests until a later push succeeds with them. UserError when none
    did. A server that is away later and comes back is given them again. One that says it took other weights
    than the last and then answers a probe as before is warned of and counted as `unmoved`. Every process of a
    run calls this.
    """
    generation = {"eos_token_id": list(engine.eos_ids), "pad_token_id": engine.tokenizer.pad_token_id}
    merged, config = lora.merged(params), engine.model_config
    hf.save_params(merged, config, folder, tokenizer=engine.tokenizer, generation=generation, tied_head=True)
    probe = _probe(server, engine)

    def reload_all() -> list[Call | Failed]:
        asked = probe if server.given.differs(_digest(folder)) else []
        hasty = dataclasses.replace(server, config=dataclasses.replace(server.config, patience_s=0.0))
        outcomes = [_reload(hasty, url, folder, asked) for url in server.pool.urls]
        for i, url in enumerate(server.pool.urls):
            if not any(isinstance(outcome, Call) for outcome in outcomes):
                outcomes[i] = _reload(server, url, folder, asked)  # the run cannot go on before one is back
        return outcomes

    outcomes = processes.from_main(reload_all)
    server.given.calls = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, Call)}
    usable = frozenset(server.given.calls)
    server.pool.turns.usable = usable
    server.pool.away.clear()
    first = next((outcome for outcome in outcomes if isinstance(outcome, Failed)), None)
    if not usable:
        raise UserError(f"config.engine: no server loaded {folder} ({first}){_hint(server, first)}")
    if first is not None:
        log.warning("a server did not load the weights and is left out for now: %s", first)
    server.pool.counters.add("pushes")
    return len(usable)


def _hint(server: Server, failed: Failed | None) -> str:
    unknown = failed is not None and failed.kind == "http_404" and server.config.kind == "vllm"
    return "; vLLM takes weights when it was started with VLLM_SERVER_DEV_MODE=1" if unknown else ""


def _reload(server: Server, url: str, folder: pathlib.Path, probe: Sequence[Call]) -> Call | Failed:
    """What made this server load the new weights, or why it does not hold them, as far as it says.

    probe: requests whose answers should now be others.
    """
    alone = make_pool((url,), server.config, server.pool.api_key)
    before = post_all(alone, probe)
    ways, then = reload_calls(server.config.kind, str(folder))
    for way in ways:
        (answer,) = post_all(alone, [way])
        if not isinstance(answer, Failed) or not unknown_way(answer):
            break
    refused = [answer] if isinstance(answer, Failed) else post_all(alone, then)
    for failed in refused:
        if isinstance(failed, Failed):
            return failed
    answered = before and not any(isinstance(answer, Failed) for answer in before)
    if answered and post_all(alone, probe) == before:
        server.pool.counters.add("unmoved")
        log.warning(
            "%s says that it loaded %s, but its log-probabilities are those of before to the last digit: "
            "start it from that folder (a very small learning rate may be the cause too)",
            url,
            folder,
        )
    return way


def _probe(server: Server, engine: Engine) -> list[Call]:
    """A few greedy continuations, whose log-probabilities move with any change of the weights."""
    greedy = dataclasses.replace(engine, sampling=GREEDY)
    batch = PromptBatch(np.zeros((1, 1), np.int32), np.ones(1, np.int32))
    terms = _terms(server, greedy, Request(batch, jax.random.key(0), 1, _PROBE_TOKENS), None)
    ids = [int(i) for i in np.arange(16) * 31 % engine.model_config.vocab_size]
    return [completion_call(terms, ids[i : i + 4], 1, 0) for i in range(0, 16, 4)]


def _digest(folder: pathlib.Path) -> int:
    """Of the weights in an HF folder: a checksum, fast enough for a look at every push."""
    digest = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest = zlib.crc32(block, digest)
    return digest
