"""A row's text as the scheduler's thread writes it, on the event loop's side."""

import asyncio
from collections.abc import AsyncGenerator

from gtalign_jax.rollout.continuous import Row
from gtalign_jax.serving.server.ask import ApiError
from gtalign_jax.serving.server.scheduler import FAILED, LENGTH, STOP, Closed, Scheduler, Tokens
from gtalign_jax.serving.server.text import Piece, TextStream


async def write(
    scheduler: Scheduler, row: Row, stream: TextStream
) -> AsyncGenerator[tuple[Piece, int, str | None]]:
    """A row's text as it comes, how many more tokens were written for it, and how it ended, last.

    The row is forgotten as soon as nobody reads on, or a stop string came; what it wrote after that counts
    for nobody.
    """
    loop, told = asyncio.get_running_loop(), asyncio.Queue[Tokens]()

    def tell(tokens: Tokens) -> None:
        loop.call_soon_threadsafe(told.put_nowait, tokens)

    try:
        ticket = scheduler.submit(row, tell)
    except Closed as error:
        raise ApiError(503, str(error), retry_s=5) from error
    try:
        finish = None
        while finish is None:
            tokens = await told.get()
            if tokens.done == FAILED:
                raise ApiError(500, "the device failed on this request; try again", code="device_failed")
            ended, before = tokens.done == STOP, len(stream.tokens)  # by an end token, which is no text
            piece = stream.feed(tokens.ids[: len(tokens.ids) - ended], tokens.logps, tokens.likely)
            count = len(stream.tokens) - before
            if piece.stopped:
                finish = STOP
            elif tokens.done:
                finish, last = (LENGTH if tokens.done == LENGTH else STOP), stream.end()
                piece = Piece(piece.text + last.text, piece.tokens + last.tokens, last.stopped)
                count += ended
            yield piece, count, finish
    finally:
        scheduler.cancel(ticket)
