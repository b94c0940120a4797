"""The server as an ASGI application: who asks, for what, within which limits; the backend writes.

    /v1/chat/completions   /v1/completions      POST, with a key where there are keys
    /v1/models   /v1/models/NAME                GET, with a key
    /health   /metrics                          GET
    /   /page/NAME                              GET, the page

A completion is let in, read, answered and logged here, whatever becomes of it.
"""

import asyncio
import dataclasses
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gtalign_jax.serving.page import routes as page
from gtalign_jax.serving.server import answers, wire
from gtalign_jax.serving.server.access import Admission, Key, Keys, Limits
from gtalign_jax.serving.server.answers import Account
from gtalign_jax.serving.server.ask import ApiError, Bounds
from gtalign_jax.serving.server.metrics import Metrics
from gtalign_jax.serving.server.parts import Backend
from gtalign_jax.serving.server.protocol import parse_json, read_ask
from gtalign_jax.serving.server.wire import ClientGone

LOG = logging.getLogger("gtalign_jax.serving.requests")
GONE = 499  # as proxies log a client that left


@dataclasses.dataclass(frozen=True)
class Service:
    """What the application serves with. log_prompts: prompts and answers may stand in the log."""

    backend: Backend
    keys: Keys
    bounds: Bounds
    limits: Limits = Limits()
    log_prompts: bool = False


def make_app(service: Service) -> Starlette:
    """The application; it closes the backend when it ends."""
    metrics, admission = Metrics(service.backend.numbers), Admission(service.limits)
    metrics.in_work.set_function(lambda: admission.total)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await service.backend.close()

    async def health(request: Request) -> Response:
        ready = service.backend.ready()
        return JSONResponse({"status": "ok" if ready else "down"}, 200 if ready else 503)

    async def counters(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(request: Request) -> Response:
        service.keys.find(request.headers.get("authorization"))
        known = [
            {"id": n, "object": "model", "created": 0, "owned_by": "gtalign"} for n in service.backend.models
        ]
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": known})
        for one in known:
            if one["id"] == name:
                return JSONResponse(one)
        raise ApiError(404, f"model {name!r}: not here", param="model", code="model_not_found")

    return Starlette(
        routes=[
            Route(
                "/v1/chat/completions", Completions(service, metrics, admission, chat=True), methods=["POST"]
            ),
            Route("/v1/completions", Completions(service, metrics, admission, chat=False), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", models),
            Route("/health", health),
            Route("/metrics", counters),
            *page.routes(bool(service.keys.keys), service.bounds),
        ],
        exception_handlers={ApiError: _on_error, HTTPException: _on_error, Exception: _on_error},
        lifespan=lifespan,
    )


async def _on_error(request: Request, error: Exception) -> Response:
    """Whatever went wrong outside of a completion, in the protocol's shape."""
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{request.method} {request.url.path!r}: {error.detail}")
    if not isinstance(error, ApiError):
        error = ApiError(500, "the server failed; its log says why")
    return JSONResponse(error.body(), error.status)


class Completions:
    """An endpoint that answers prompts."""

    def __init__(self, service: Service, metrics: Metrics, admission: Admission, chat: bool) -> None:
        self._service, self._metrics, self._admission, self._chat = service, metrics, admission, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        entry, place = _Entry(scope["path"]), ExitStack()

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                message["headers"].append((b"x-request-id", entry.name.encode()))
            elif not message.get("more_body"):
                place.close()  # before the last byte: who has the answer may ask again at once
            await send(message)

        try:
            key = self._service.keys.find(wire.header(scope, "authorization"))
            entry.key = key.name
            with place:
                place.enter_context(self._admission.enter(key))
                await self._serve(key, receive, counted, entry)
        except ApiError as error:
            entry.error = error.message
            await wire.send_error(counted, error)
        except (ClientGone, OSError):
            entry.status, entry.error = GONE, "the client left"
            self._metrics.left.inc()
        except Exception:
            LOG.exception("request %s failed", entry.name)
            entry.error = "the server failed"
            if not entry.status:
                await wire.send_error(counted, ApiError(500, "the server failed; its log says why"))
        finally:
            entry.report(self._metrics)

    async def _serve(self, key: Key, receive: Receive, send: Send, entry: "_Entry") -> None:
        service, limits = self._service, self._service.limits
        body = parse_json(await wire.read_body(receive, limits.body_bytes, limits.read_s))
        ask = read_ask(body, self._chat, key.defaults, service.bounds)
        # In a thread: a megabyte of text takes seconds to become tokens, and the others would wait.
        found = await asyncio.to_thread(service.backend.answers, ask)
        model = ask.model or service.backend.models[0]
        if service.log_prompts:
            entry.prompts, entry.account.texts = list(ask.prompts), {}

        async def work() -> None:
            if ask.stream:
                await wire.send_events(send, answers.chunks(ask, found, model, entry.account))
            else:
                await wire.send_json(send, await answers.whole(ask, found, model, entry.account))

        try:
            await wire.while_there(receive, work(), limits.request_s)
        except TimeoutError as error:
            entry.error = f"not done in {limits.request_s:g} s"
            if entry.status:  # the answer was begun, so all that is left is to break it off
                raise ClientGone from error
            raise ApiError(504, f"the answer was {entry.error}", code="timeout") from error


@dataclasses.dataclass
class _Entry:
    """A request's line in the log."""

    path: str
    name: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    begun: float = dataclasses.field(default_factory=time.monotonic)
    key: str = ""
    status: int = 0
    error: str | None = None
    account: Account = dataclasses.field(default_factory=Account)
    prompts: list[Any] | None = None

    def report(self, metrics: Metrics) -> None:
        """Count the request and write its line."""
        account, seconds = self.account, time.monotonic() - self.begun
        metrics.requests.labels(self.path, str(self.status)).inc()
        metrics.seconds.labels(self.path).observe(seconds)
        metrics.tokens.labels("prompt").inc(account.usage.prompt)
        metrics.tokens.labels("completion").inc(account.usage.completion)
        line: dict[str, Any] = {
            "request": self.name,
            "path": self.path,
            "status": self.status,
            "key": self.key,
        }
        line |= {
            "seconds": round(seconds, 4),
            **dataclasses.asdict(account.usage),
            "finish": account.finishes,
        }
        if account.first_s is not None:
            metrics.first.observe(account.first_s - self.begun)
            line["first_text_s"] = round(account.first_s - self.begun, 4)
        for outcome, count in account.steering.items():
            metrics.steered.labels(outcome).inc(count)
            line[outcome] = count
        if self.error is not None:
            line["error"] = self.error
        if self.prompts is not None:
            said = account.texts or {}
            line |= {"prompts": self.prompts, "answers": ["".join(said[i]) for i in sorted(said)]}
        LOG.info(json.dumps(line, ensure_ascii=False))
