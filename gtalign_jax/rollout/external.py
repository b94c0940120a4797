"""Rollouts from inference servers (vLLM, SGLang, any OpenAI-compatible one) in the place of our own engine.

    server   = servers.connect(config)
    generate = functools.partial(external.rollout, server)      the signature of `engine.rollout`
    push_weights(server, params, engine, folder)                HF export, then the servers' reload call

A sample whose request failed has length 0: no token of it is an action, so nothing is learnt from it, and
the caller drops it from its group. How far a server's log-probabilities are from the trainer's is measured
in every update (`sampler/gap`, `kl/sampler`) and corrected when `algorithm.is_cap` is set.
"""

from __future__ import annotations

import collections
import logging
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from gtalign_jax.errors import UserError
from gtalign_jax.mesh import processes
from gtalign_jax.models import hf, lora
from gtalign_jax.remote.pool import Call, Failed, Pool, post_all
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.backends import Ask, Completion, completion_call, reload_calls
from gtalign_jax.rollout.buckets import bucket
from gtalign_jax.rollout.decode import Ending
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.grammar import Constraint
from gtalign_jax.rollout.servers import Server
from gtalign_jax.types import Array, PromptBatch, PyTree, Rollout

log = logging.getLogger(__name__)


# --- generation -----------------------------------------------------------------------------------


def rollout(
    server: Server,
    engine: Engine,
    params: PyTree,
    prompts: PromptBatch,
    key: Array,
    group_size: int,
    max_new_tokens: int,
    *,
    ending: Ending | None = None,
    constraint: Constraint | None = None,
    first_row: int = 0,
    seeds: np.ndarray | None = None,
    stops: Sequence[str] = (),
) -> Rollout:
    """group_size completions of each prompt as `engine.rollout` gives them, host arrays, from a server.

    The engine lends its tokenizer, end tokens, sampling and buckets. params are not read: the server
    answers with the weights it was last given. stops: the texts of `ending`, told to the server so that
    it stops there; without them it writes on and the row is cut here. seeds [P, G] int32: default from
    (key, first_row + p) and g. Samples of failed requests have length 0 and are not finished, and the
    reasons are logged. Raises UserError when no request at all was answered, and for a constraint, whose
    log-probabilities no server returns.
    """
    del params
    if constraint is not None:
        raise UserError(
            "config.engine.kind: no server reports log-probabilities under the grammar; use the embedded "
            "engine, or switch the grammar off"
        )
    prompts = jax.device_get(prompts)
    count = prompts.tokens.shape[0]
    base = _seeds(key, first_row, count, group_size) if seeds is None else np.asarray(seeds) & 0x7FFFFFFF
    if base.shape != (count, group_size):
        raise UserError(f"seeds: shape {base.shape}, needs {(count, group_size)}, one a sample")
    if stops and ending is None:
        ending = engine_lib.make_ending(engine, stops)
    ask = _ask(server, engine, max_new_tokens, ending, stops)
    whole_groups = seeds is None and ask.kind != "sglang"
    rows = sum(processes.all_gather(_completions(server, ask, prompts, base, whole_groups)), [])
    _report(server, rows)
    return _to_rollout(engine, prompts, rows, group_size, max_new_tokens, ending)


def _completions(
    server: Server, ask: Ask, prompts: PromptBatch, seeds: np.ndarray, whole_groups: bool
) -> list[Completion | Failed]:
    """Row after row of this host's part of the prompts. whole_groups: a group is one request."""
    count, group_size = seeds.shape
    calls = []
    for p in range(count)[processes.part(count)]:
        ids = prompts.tokens[p, : prompts.length[p]]
        requests = [(group_size, seeds[p, 0])] if whole_groups else [(1, seed) for seed in seeds[p]]
        calls += [completion_call(ask, ids, n, int(seed)) for n, seed in requests]
    each = group_size if whole_groups else 1
    rows: list[Completion | Failed] = []
    for answer in post_all(server.pool, calls):
        rows += [answer] * each if isinstance(answer, Failed) else answer
    return rows


def _seeds(key: Array, first_row: int, count: int, group_size: int) -> np.ndarray:
    """[P, G] of 31 bits; a server that makes several samples of one seed adds their number to it too."""
    words = [int(word) for word in np.asarray(jax.random.key_data(key)).reshape(-1)]
    draw = lambda p: np.random.default_rng([*words, first_row + p]).integers(2**31 - 2**16)
    return np.array([[draw(p)] for p in range(count)]) + np.arange(group_size)


def _ask(server: Server, engine: Engine, max_tokens: int, ending: Ending | None, stops: Sequence[str]) -> Ask:
    eos = engine.eos_ids if ending is None else tuple(int(i) for i in np.asarray(ending.eos))

    def text_ids() -> Mapping[str, Sequence[int]]:
        found = collections.defaultdict(list)
        for i, text in enumerate(engine_lib.token_texts(engine)):
            found[text].append(i)
        return found

    return Ask(
        kind=server.config.kind,
        model=server.config.model,
        sampling=engine.sampling,
        max_tokens=max_tokens,
        vocab_size=engine.model_config.vocab_size,
        eos_ids=eos,
        stops=tuple(stops),
        text_ids=text_ids,
    )


def _report(server: Server, rows: Sequence[Completion | Failed]) -> None:
    """Count the tokens, log why samples are missing; UserError when all are."""
    reasons = collections.Counter(row.reason for row in rows if isinstance(row, Failed))
    server.pool.add("tokens", sum(len(row.ids) for row in rows if isinstance(row, Completion)))
    if not reasons:
        return
    (reason, _), missing = reasons.most_common(1)[0], sum(reasons.values())
    if missing == len(rows):
        raise UserError(f"config.engine: none of {missing} samples came back ({reason})")
    log.warning("%d of %d samples are missing and dropped; most often: %s", missing, len(rows), reason)


def _to_rollout(
    engine: Engine,
    prompts: PromptBatch,
    rows: Sequence[Completion | Failed],
    group_size: int,
    max_new_tokens: int,
    ending: Ending | None,
) -> Rollout:
    """Rows p*G + g as arrays in the engine's buckets."""
    count, slots = prompts.tokens.shape
    width = bucket(slots, engine.buckets.prompt, "prompt", "the longest prompt")
    budget = bucket(max_new_tokens, engine.buckets.completion, "completion", "max_new_tokens")
    tokens = np.zeros((count * group_size, budget), np.int32)
    logp = np.zeros(tokens.shape, np.float32)
    length, finished = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), bool)
    for i, row in enumerate(rows):
        if isinstance(row, Failed):
            continue
        n, stopped = _cut(row.ids, ending)
        tokens[i, :n], logp[i, :n] = row.ids[:n], row.logprobs[:n]
        length[i], finished[i] = n, stopped or row.finished
    shape = (count, group_size)
    length = length.reshape(shape)
    return Rollout(
        prompt=np.pad(np.asarray(prompts.tokens), ((0, 0), (0, width - slots))),
        prompt_length=np.asarray(prompts.length),
        completion=tokens.reshape(*shape, budget),
        length=length,
        finished=finished.reshape(shape),
        sampler_logp=logp.reshape(*shape, budget),
        action_mask=np.arange(budget) < length[..., None],
    )


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


# --- weights --------------------------------------------------------------------------------------


def push_weights(server: Server, params: PyTree, engine: Engine, folder: pathlib.Path) -> int:
    """Write the model, adapters merged, as the HF folder `folder`, atomically, and have every server load it.

    The servers must see the same path; vLLM must have been started from it. Returns how many took the
    weights; the others get no more requests until a later push succeeds with them. UserError when none did.
    Every process of a run calls this.
    """
    generation = {"eos_token_id": list(engine.eos_ids), "pad_token_id": engine.tokenizer.pad_token_id}
    extra = {"tokenizer": engine.tokenizer, "generation": generation}
    hf.save_params(lora.merged(params), engine.model_config, folder, **extra)
    calls = reload_calls(server.config.kind, str(folder))
    failures = processes.from_main(lambda: [_reload(server, url, calls) for url in server.pool.urls])
    server.pool.usable = frozenset(i for i, failed in enumerate(failures) if failed is None)
    first = next((failed for failed in failures if failed is not None), None)
    if not server.pool.usable:
        raise UserError(f"config.engine: no server loaded {folder} ({first.reason})")
    if first is not None:
        log.warning("a server did not load the weights and is left out for now: %s", first.reason)
    server.pool.add("pushes")
    return len(server.pool.usable)


def _reload(server: Server, url: str, calls: Sequence[Call]) -> Failed | None:
    """Why this server does not hold the new weights, or None when it does."""
    alone = Pool([url], server.config, server.pool.api_key)
    for call in calls:
        (answer,) = post_all(alone, [call])
        if isinstance(answer, Failed):
            return answer
    return None
