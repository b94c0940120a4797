"""Requests in, rollouts out: the host side of generation.

Ragged prompts are padded into a few fixed shapes, so that a handful of programs is compiled once;
`programs.compiled_programs()` counts them.
"""

import jax
import numpy as np

from gtalign_jax.errors import UserError
from gtalign_jax.mesh import processes
from gtalign_jax.rollout import compaction, grammar, placing, programs, refill
from gtalign_jax.rollout.decode_state import DecodeState, Forced
from gtalign_jax.rollout.engine import Engine, make_ending, prompt_batch
from gtalign_jax.rollout.programs import Compile
from gtalign_jax.rollout.request import Placed, Request, Rules, row_numbers
from gtalign_jax.types import PyTree, Rollout


def rollout(engine: Engine, params: PyTree, request: Request) -> Rollout:
    """The completions that are asked for, in bucketed shapes.

    Their axis N is the bucket of max_new_tokens; no row is longer than max_new_tokens itself. UserError for
    a prompt, batch or budget without a bucket, for seeds of another shape, and for a budget that holds no
    chain under the constraint.
    """
    count, row = request.prompts.tokens.shape[0], row_numbers(request)
    rules = _make_rules(engine, request)
    if refill.waits(engine, count, request.group_size):
        return refill.rollout(engine, params, request, rules)
    placed = placing.place(engine, request, row, placing.padded(engine, count))
    return _trim(_run(engine, params, placed, rules, request.max_new_tokens), count)


def warm_up(engine: Engine, params: PyTree, request: Request) -> None:
    """Compile all that `rollout` will run for such requests, in every bucket of prompts.

    request: its prompts, key and seeds do not matter.
    """
    rules, counts = _make_rules(engine, request), engine.buckets.batch or (1,)
    waits = [refill.waits(engine, count, request.group_size) for count in counts]
    for width in engine.buckets.prompt:
        one = request.replace(prompts=prompt_batch(engine, [[0] * width]), seeds=None)
        for count, queued in zip(counts, waits, strict=True):
            if not queued:
                prompts = placing.padded(engine, count)
                placed = placing.place(engine, one, np.arange(prompts, dtype=np.int32), prompts)
                _run(engine, params, placed, rules, until=0, compile_only=True)
        if any(waits) or (engine.rows and not engine.buckets.batch):
            refill.warm_up(engine, params, one, rules)


def compile_largest(compiling: Compile, engine: Engine, params: PyTree, request: Request) -> None:
    """Have the programs compiled that `rollout` needs most memory for with such a request; none runs.

    params: arrays or their shapes. request: the values of its arrays do not matter.
    """
    count, rules = request.prompts.tokens.shape[0], _make_rules(engine, request)
    if refill.waits(engine, count, request.group_size):
        refill.compile_largest(compiling, engine, params, request, rules)
        return
    config, sampling = engine.model_config, engine.sampling
    placed = placing.place(engine, request, row_numbers(request), placing.padded(engine, count))
    args = (params, config, placed, sampling, rules)
    with placing.on_mesh(engine):
        if not engine.compact_every:
            programs.outcome(compiling, programs.generate, *args, until=np.int32(0))
            return
        state = programs.outcome(compiling, programs.start, *args)
        weights = programs.outcome(compiling, programs.prepare, params, config)
        rows = placed.prompts.tokens.shape[0] * placed.group_size
        decoding = compaction.make_decoding(engine, weights, rules, 0, rows)
        compaction.compile_first(compiling, decoding, state)


def _run(
    engine: Engine, params: PyTree, placed: Placed, rules: Rules, until: int, compile_only: bool = False
) -> Rollout:
    """Generate for a placed batch; until: tokens a row may write."""
    config, sampling = engine.model_config, engine.sampling
    rows = placed.prompts.tokens.shape[0] * placed.group_size
    with placing.on_mesh(engine):
        if not engine.compact_every:
            return programs.generate(params, config, placed, sampling, rules, until=np.int32(until))
        state = programs.start(params, config, placed, sampling, rules)
        decoding = compaction.make_decoding(engine, programs.prepare(params, config), rules, until, rows)
        if compile_only:
            state = compaction.warm_up(decoding, state)
        return compaction.finish(decoding, state)


def begin(engine: Engine, params: PyTree, request: Request) -> DecodeState:
    """Generate until every row ended, and return the state, which `resume` can go on from."""
    count, rules = request.prompts.tokens.shape[0], _make_rules(engine, request)
    placed = placing.place(engine, request, row_numbers(request), placing.padded(engine, count))
    config, until = engine.model_config, np.int32(request.max_new_tokens)
    with placing.on_mesh(engine):
        state = programs.start(params, config, placed, engine.sampling, rules)
        return programs.advance(params, config, state, engine.sampling, rules, until=until)


def resume(
    engine: Engine, params: PyTree, state: DecodeState, forced: Forced, keep: int, request: Request
) -> DecodeState:
    """Keep the first `keep` tokens of every row with their cache, write the forced ones, generate on.

    The state is consumed. forced: [P, G, N] tokens from position 0 on (those before `keep` are the
    row's own), and how many of them to write. request: as in `begin`, with the ending that holds from here
    on; its prompts and key are the state's.
    """
    rules, until = _make_rules(engine, request), np.int32(request.max_new_tokens)
    with placing.on_mesh(engine):
        kept = programs.rewind(state, np.int32(keep), rules.constraint)
        return programs.advance(
            params, engine.model_config, kept, engine.sampling, rules, until=until, forced=forced
        )


def _make_rules(engine: Engine, request: Request) -> Rules:
    """The arrays that the rows of a request are held to, the constraint within its budget.

    UserError when the budget is below the shortest chain.
    """
    ending = make_ending(engine, request.stops) if request.ending is None else request.ending
    if request.constraint is None:
        return Rules(ending)
    least, budget = grammar.shortest(request.constraint), request.max_new_tokens
    if budget < least:
        raise UserError(f"max_new_tokens={budget}: the shortest chain takes {least}; raise it")
    return Rules(ending, request.constraint._replace(budget=np.int32(budget)))


def _trim(result: Rollout, count: int) -> Rollout:
    """Without the padding prompts; on the host when there were any."""
    if jax.process_count() > 1:
        result = processes.fetch(result)  # every host judges a part of it, and all train on it
    if result.prompts.tokens.shape[0] == count:
        return result
    return jax.tree.map(lambda x: x[:count], jax.device_get(result))
