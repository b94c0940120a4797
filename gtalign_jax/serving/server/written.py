"""A row's text as the scheduler's thread writes it, on the event loop's side."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator

from gtalign_jax.rollout.continuous import Row
from gtalign_jax.serving.server.ask import ApiError
from gtalign_jax.serving.server.scheduler import (
    FAILED,
    LENGTH,
    STOP,
    Closed,
    Scheduler,
    Tell,
    Ticket,
    Tokens,
)
from gtalign_jax.serving.server.text import Piece, Spoken, TextStream


@dataclasses.dataclass(eq=False)
class Stand:
    """Where the rows of one answer are written, one after the other.

    `write` leaves the place of a row that a stop string ended to the next, which goes on from it. Close it
    when the answer is done.
    """

    scheduler: Scheduler
    ticket: Ticket | None = None

    def submit(self, row: Row, tell: Tell, kept: int) -> Ticket:
        """The next row; kept: how many tokens, prompt and all, it has of the one before."""
        try:
            if kept and self.ticket is not None:
                return self.scheduler.follow(self.ticket, row, tell, kept)
            self.close()
            return self.scheduler.submit(row, tell)
        except Closed as error:
            raise ApiError(503, str(error), retry_s=5) from error

    def close(self) -> None:
        """Give up the place that is kept."""
        if self.ticket is not None:
            self.scheduler.cancel(self.ticket)
            self.ticket = None


async def write(
    stand: Stand, row: Row, stream: TextStream, kept: int = 0
) -> AsyncGenerator[tuple[Piece, int, str | None]]:
    """A row's text as it comes, how many more tokens were written for it, and how it ended, last.

    kept: how many tokens, prompt and all, the row has of the one before it. The row is forgotten as soon as
    nobody reads on, and what it wrote after a stop string counts for nobody.
    """
    loop, told = asyncio.get_running_loop(), asyncio.Queue[Tokens]()

    def tell(tokens: Tokens) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody listens
            loop.call_soon_threadsafe(told.put_nowait, tokens)

    ticket, keep = stand.submit(row, tell, kept), False
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
                end = (_end(tokens, len(stream.text)),) if ended and not last.stopped else ()
                piece = Piece(piece.text + last.text, piece.tokens + last.tokens, last.stopped, end)
                count += ended
            keep = piece.stopped
            yield piece, count, finish
    finally:
        stand.close()
        if keep:
            stand.ticket = ticket
        else:
            stand.scheduler.cancel(ticket)


def _end(tokens: Tokens, at: int) -> Spoken:
    """The last of a row's tokens, which stands behind its text."""
    return Spoken(tokens.ids[-1], tokens.logps[-1], at, tokens.likely[-1] if tokens.likely else ())
