"""Connections that keep nobody waiting: uvicorn's own, with limits it does not have.

A connection that asks for nothing, sends half a request or takes no answer is dropped after a while, and
there are never more than so many.
"""

import asyncio
import dataclasses
import functools
import resource
import socket
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gtalign_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Patience:
    """connections: at most. idle_s: without a request in work. unread_s: without a byte of an answer read."""

    connections: int = 4096
    idle_s: float = 20.0
    unread_s: float = 60.0


class Connection(H11Protocol):
    """One connection. Arguments besides `patience` are uvicorn's."""

    def __init__(self, *args: Any, patience: Patience, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patience = patience
        self._idle: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` tells of any byte not taken
        if len(self.connections) > self._patience.connections:
            transport.abort()
        else:
            self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._idle, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self._patience.unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def _wait(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = self.loop.call_later(self._patience.idle_s, self._drop)

    def _drop(self) -> None:
        """Unless a request is in work; when it is done, `_wait` begins again."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def make_server(app: Any, patience: Patience, drain_s: float) -> uvicorn.Server:
    """A server that is not started. drain_s: what is in work at SIGTERM has so long to end."""
    made = functools.partial(Connection, patience=patience)
    config = uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], made),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        backlog=min(patience.connections, 2048),
        timeout_graceful_shutdown=int(drain_s),
    )
    return uvicorn.Server(config)


def bind(host: str, port: int) -> socket.socket:
    """A socket for `Server.run(sockets=[...])` to listen on. UserError when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: {error.strerror}; name another address") from error
    return bound


def allow_files(connections: int) -> None:
    """Raise this process's bound of open files towards one for each connection, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        bound = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (bound, hard))
