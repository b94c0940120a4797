"""An answer whose matrix is edited on the way, in two rows of the scheduler.

    row 1   prompt                      → <thinking> … <payoff> M </payoff>
    row 2   prompt, the same up to M'   → <analyze> … <response> …        M' as the pricing says

Between them the prefix is token ids: the model's own before the matrix, and those of M'. Row 2 sits down in
row 1's place, computes what follows those, and goes on in row 1's random stream, so that the whole is what
one generation forced to the prefix would be. `steer.steer` does the same for prompts that are known together.
"""

import contextlib
import dataclasses
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np

from gtalign_jax.chain.parse import chosen_action, parse_chain
from gtalign_jax.chain.prompt import payoff_json
from gtalign_jax.errors import UserError
from gtalign_jax.game.pricing import apply_policy, as_written
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.continuous import Row
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.serving.server.ask import ApiError, Ask, Pricing
from gtalign_jax.serving.server.parts import Part, Usage
from gtalign_jax.serving.server.scheduler import LENGTH, STOP, Scheduler
from gtalign_jax.serving.server.text import Before, TextStream
from gtalign_jax.serving.server.written import Stand, write
from gtalign_jax.serving.solution import solution
from gtalign_jax.serving.splice import CLOSE, ERROR, GRAMMAR, OPEN, UNSTEERED, read_payoff, splice_payoff

SPLICED = 128  # tokens that an edited matrix and a solver's analysis may add to a prefix


@dataclasses.dataclass(frozen=True)
class Cut:
    """A first pass and what is gone on with.

    payoff, edited: None, and why in `reason`, without an edit. over: the answer ended with it. tries: of
    the answer so far. kept: how many tokens of the prefix are the pass's own.
    """

    prefix: tuple[int, ...]
    payoff: np.ndarray | None = None
    edited: np.ndarray | None = None
    reason: str | None = None
    over: bool = False
    tries: int = 1
    kept: int = 0


ENDED = Cut((), reason="the answer ended before its matrix did", over=True)


def first_row(engine: Engine, row: Row) -> Row:
    """The row of the first pass, whose tokens the second reads as a prompt. ApiError when none has room."""
    longest = engine.buckets.prompt[-1] - SPLICED
    if len(row.prompt) >= longest:
        said = f"the prompt has {len(row.prompt)} tokens; a priced one has fewer than {longest}"
        raise ApiError(400, said, code="context_length_exceeded")
    room = min(row.max_new_tokens, longest - len(row.prompt))
    return dataclasses.replace(row, max_new_tokens=room, stops=True)


@dataclasses.dataclass
class _First:
    """A first pass while it is written.

    sent: characters of it that were given out. finish: how it ended; stopped: by </payoff>, or by a stop
    string of the request.
    """

    stream: TextStream
    sent: int = 0
    finish: str | None = None
    stopped: bool = False


async def answer(scheduler: Scheduler, engine: Engine, ask: Ask, row: Row) -> AsyncGenerator[Part]:
    """The parts of one priced answer; the last tells what was done.

    Text before the matrix comes as it is written, the matrix once it is edited. `ask.unusable` says what
    becomes of an answer whose matrix cannot be read or edited: another is written, perhaps under the grammar,
    it is an error (422), or it goes on as it is and says so. But for the last of these, no text comes before
    the matrix is settled.
    """
    with contextlib.closing(Stand(scheduler)) as stand:
        for attempt in range(ask.tries):
            held = attempt > 0 and ask.unusable == GRAMMAR
            tried = dataclasses.replace(row, seed=_stream(row.seed, attempt), held=held)
            first = _First(TextStream(engine, (CLOSE, *ask.stop)))
            async with contextlib.aclosing(_begin(stand, engine, ask, tried, first)) as begun:
                async for part in begun:
                    yield part
            cut = dataclasses.replace(_cut(engine, ask, tried, first), tries=attempt + 1)
            if cut.edited is not None or (cut.over and first.stopped):
                break
        check_usable(ask, cut)
        if cut.over:
            said = steering(ask, cut, first.stream.text)
            yield Part(first.stream.text[first.sent :], finish=first.finish, steering=said)
            return
        sent = first.sent
        async with contextlib.aclosing(_go_on(stand, engine, ask, tried, cut)) as parts:
            async for part, text in parts:
                skipped, sent = min(sent, len(part.text)), max(0, sent - len(part.text))
                done = steering(ask, cut, text) if part.finish else None
                yield dataclasses.replace(part, text=part.text[skipped:], steering=done)


def _stream(seed: int, attempt: int) -> int:
    """The random stream of a try."""
    return (seed + attempt * 0x3C6EF35F) % 2**31


async def _begin(stand: Stand, engine: Engine, ask: Ask, row: Row, first: _First) -> AsyncGenerator[Part]:
    """The parts of a first pass, up to its matrix."""
    before = Before(OPEN)
    yield Part(usage=Usage(prompt=len(row.prompt)))
    async with contextlib.aclosing(write(stand, first_row(engine, row), first.stream)) as pieces:
        async for piece, count, first.finish in pieces:
            first.stopped = piece.stopped
            text = before.feed(piece.text) if ask.unusable == UNSTEERED else ""
            first.sent += len(text)
            yield Part(text, usage=Usage(completion=count))


def _cut(engine: Engine, ask: Ask, row: Row, first: _First) -> Cut:
    """What a first pass comes to."""
    whole = engine_lib.decode_tokens(engine, first.stream.tokens)
    if not whole[len(first.stream.text) :].startswith(CLOSE):
        return ENDED
    return edit(engine, first.stream.tokens, ask, row)


async def _go_on(
    stand: Stand, engine: Engine, ask: Ask, row: Row, cut: Cut
) -> AsyncGenerator[tuple[Part, str]]:
    """(part, all text so far) of the prefix and what follows it."""
    stream = TextStream(engine, ask.stop)
    piece = stream.feed(cut.prefix, [0.0] * len(cut.prefix))
    left = row.max_new_tokens - len(cut.prefix)
    if piece.stopped or left < 1:
        yield Part(piece.text, finish=STOP if piece.stopped else LENGTH), stream.text
        return
    prompt = (*row.prompt, *cut.prefix)
    yield Part(piece.text, usage=Usage(prompt=len(prompt))), stream.text
    rest = dataclasses.replace(row, prompt=prompt, max_new_tokens=left, first=len(cut.prefix))
    kept = len(row.prompt) + cut.kept
    async with contextlib.aclosing(write(stand, rest, stream, kept)) as pieces:
        async for piece, count, finish in pieces:
            yield Part(piece.text, finish=finish, usage=Usage(completion=count)), stream.text


def edit(engine: Engine, token_ids: Sequence[int], ask: Ask, row: Row) -> Cut:
    """What a sequence that ends with its matrix goes on with, within the row's budget for the whole."""
    assert ask.pricing is not None
    own = tuple(token_ids)
    try:
        payoff = read_payoff(engine_lib.decode_tokens(engine, own))
        edited = edited_payoff(payoff, ask.pricing)
        splice = splice_payoff(engine, own, edited, ask.analyze)
    except UserError as error:
        return Cut(own, reason=str(error).partition(";")[0], kept=len(own))
    prefix = splice.prefix
    longest = engine.buckets.prompt[-1]
    if len(prefix) >= row.max_new_tokens:
        said = f"max_tokens={row.max_new_tokens}: the edited matrix ends at token {len(prefix)}; raise it"
        return Cut(own, payoff, reason=said, kept=len(own))
    if (count := len(row.prompt) + len(prefix)) > longest:
        said = f"prompt and edited matrix have {count} tokens; at most {longest} are read"
        return Cut(own, payoff, reason=said, kept=len(own))
    return Cut(prefix, payoff, edited, kept=splice.kept)


def edited_payoff(payoff: np.ndarray, pricing: Pricing) -> np.ndarray:
    """The matrix [U, A, 2] as the pricing has it, as models read it."""
    if pricing.matrix is not None:
        payoff = np.array(pricing.matrix).reshape(payoff.shape)
    edited = apply_policy(payoff, pricing.policy, pricing.price, pricing.amounts)
    return as_written(edited, pricing.step)


def check_usable(ask: Ask, cut: Cut) -> None:
    """ApiError where an answer without an edit is to be none."""
    if cut.edited is None and ask.unusable == ERROR:
        raise ApiError(422, f"pricing: not steered: {cut.reason}", param="pricing", code="unusable_matrix")


def steering(ask: Ask, cut: Cut, text: str) -> dict[str, Any]:
    """What an answer says of its pricing.

    action: which <analyze> names. recommended: by the matrix that it was written after.
    """
    assert ask.pricing is not None
    shown = cut.payoff if cut.edited is None else cut.edited
    return {
        "steered": cut.edited is not None,
        "reason": cut.reason,
        "tries": cut.tries,
        "policy": ask.pricing.policy,
        "price": ask.pricing.price,
        "analyze": ask.analyze,
        "payoff": None if cut.payoff is None else json.loads(payoff_json(cut.payoff)),
        "edited": None if cut.edited is None else json.loads(payoff_json(cut.edited)),
        "recommended": None if shown is None else solution(shown)["action"],
        "action": chosen_action(parse_chain(text).analyze),
    }
