"""A local judge server that misbehaves on request: loopback only, an ephemeral port, stopped after each test.

A request says what it wants in the response it asks to have judged: `id=3 want=1 fault=hang` is answered
by the fault `hang`; `flaky=http500` fails once and then answers; without either, `\\boxed{want}` comes back.
"""

import asyncio
import collections
import gc
import json
import re
import threading

import pytest


class FaultServer:
    """asks [id]: how often each request arrived. in_flight, peak: requests held now, and at most."""

    def __init__(self, barrier=1):
        self.asks = collections.Counter()
        self.bodies, self.keys = [], set()
        self.in_flight = self.peak = 0
        self.barrier = barrier
        self.default = None  # a fault for every request, such as an outage
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def close(self):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    async def _serve(self):
        self._loop, self._stop, self._full = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        self._tasks = set()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.keys.update(re.findall(rb"authorization: (.+?)\r", head, re.IGNORECASE))
                size = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])
                body = json.loads(await reader.readexactly(size))
                self.in_flight += 1
                self.peak = max(self.peak, self.in_flight)
                try:
                    await self._answer(body, writer)
                finally:
                    self.in_flight -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._tasks.discard(asyncio.current_task())

    async def _answer(self, body, writer):
        self.bodies.append(body)
        said = dict(re.findall(r"(id|want|fault|flaky)=(\S+)", body["messages"][-1]["content"]))
        name = said.get("id", "")
        self.asks[name] += 1
        fault = said.get("fault") or self.default
        if "flaky" in said and self.asks[name] == 1:
            fault = said["flaky"]
        if fault and fault.startswith("refused"):
            send(writer, {"error": "not for you"}, f"{fault.removeprefix('refused')} Refused")
        elif fault:
            await getattr(self, f"_{fault}")(writer)
        else:
            send(
                writer,
                completion(f"<think>It says \\boxed{{3}}.</think>So \\boxed{{{said.get('want', '1')}}}"),
            )
        await writer.drain()

    async def _hold(self, writer):
        """Answers nobody before `barrier` requests are here together."""
        if self.in_flight >= self.barrier:
            self._full.set()
        await asyncio.wait_for(self._full.wait(), 20)
        send(writer, completion(r"\boxed{1}"))

    async def _http500(self, writer):
        send(writer, {"error": {"message": "out of memory"}}, "500 Internal Server Error")

    async def _http429(self, writer):
        send(writer, {"error": "slow down"}, "429 Too Many Requests", ("Retry-After: 0.2",))

    async def _http429_long(self, writer):
        send(writer, {"error": "come back tomorrow"}, "429 Too Many Requests", ("Retry-After: 3600",))

    async def _http400(self, writer):
        send(writer, {"error": "too long"}, "400 Bad Request")

    async def _http404(self, writer):
        send(writer, {"error": "no such model"}, "404 Not Found")

    def _said(self):
        """What came as Authorization."""
        return " ".join(key.decode() for key in self.keys)

    async def _echo401(self, writer):
        send(writer, {"error": f"no such key: {self._said()}"}, "401 Unauthorized")

    async def _echo400(self, writer):
        send(writer, {"error": f"headers: {self._said()}"}, "400 Bad Request")

    async def _echo503(self, writer):
        send(writer, {"error": f"headers: {self._said()}"}, "503 Service Unavailable")

    async def _echo_late(self, writer):
        """The key begins within what a reason keeps and ends beyond it."""
        send(writer, "x" * 145 + " " + self._said(), "400 Bad Request")

    async def _gzip200(self, writer):
        """Says that it is compressed, and is not."""
        send(writer, completion(r"\boxed{1}"), headers=("Content-Encoding: gzip",))

    async def _gzip500(self, writer):
        send(writer, "oops", "500 Internal Server Error", ("Content-Encoding: gzip",))

    async def _bytes500(self, writer):
        writer.write(
            b"HTTP/1.1 503 Busy\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\n\xff\xfe\x00\n"
        )

    async def _loop307(self, writer):
        send(writer, {}, "307 Temporary Redirect", (f"Location: {self.url}/chat/completions",))

    async def _reset(self, writer):
        writer.transport.abort()

    async def _hang(self, writer):
        await self._stop.wait()

    async def _drip(self, writer):
        """A correct answer, one byte at a time: no single read ever takes long."""
        send(writer, None)
        while not self._stop.is_set():
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)

    async def _cut(self, writer):
        """The connection ends before the announced length."""
        text = json.dumps(completion(r"\boxed{1}"))
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text[:40]}".encode())
        await writer.drain()
        writer.close()

    async def _half_json(self, writer):
        send(writer, json.dumps(completion(r"\boxed{1}"))[:-30])

    async def _deep_json(self, writer):
        send(writer, "[" * 100_000)

    async def _list_json(self, writer):
        send(writer, [1, 2])

    async def _page(self, writer):
        send(writer, "<html>It works!</html>", kind="text/html")

    async def _garbage(self, writer):
        writer.write(b"\x00\xff not http at all\r\n\r\n")
        await writer.drain()
        writer.close()

    async def _no_choices(self, writer):
        send(writer, {"choices": [], "usage": None})

    async def _no_message(self, writer):
        send(writer, {"choices": [{"message": None}]})

    async def _null_text(self, writer):
        send(writer, {"choices": [{"message": {"content": None}}]})

    async def _off_scale(self, writer):
        send(writer, completion(r"\boxed{100}"))

    async def _prose(self, writer):
        send(writer, completion("It is fine, I think: 1"))

    async def _thinks_on(self, writer):
        send(writer, completion(r"<think>surely \boxed{1}", finish="length"))

    async def _thinks_apart(self, writer):
        send(writer, completion(None, finish="length"))

    async def _odd_counts(self, writer):
        odd = completion(r"\boxed{1}") | {"usage": {"prompt_tokens": 10**400, "completion_tokens": "many"}}
        send(writer, odd)


def completion(text, finish="stop"):
    """The body of a chat completion."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    return {"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 7}}


def send(writer, body, status="200 OK", headers=(), kind="application/json"):
    """One HTTP response; without a body only the head of a long one."""
    text = body if isinstance(body, str) else json.dumps(body)
    size = 100_000 if body is None else len(text.encode())
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {size}", *headers]
    writer.write(("\r\n".join(lines) + "\r\n\r\n" + ("" if body is None else text)).encode())


@pytest.fixture(autouse=True, scope="module")
def no_long_collections():
    """Tests here have seconds to keep to; collecting what earlier modules left behind can take two."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def start_server(monkeypatch):
    """Starts fault servers; loopback never goes through a proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(**options):
        servers.append(FaultServer(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(start_server):
    return start_server()
