"""Throughput of the HTTP judge against a local server that answers after a fixed time; one JSON line.

    python -m experiments.bench_judge [--requests=2048] [--concurrency=512] [--server_ms=200] [--endpoints=1]

The server runs in a process of its own. Fields: requests, scored, missing; requests_per_s; in_flight (most
requests the server held at once); limit_per_s (concurrency / server time: what a judge that costs nothing
would reach); cpu_ms_per_request (of this process, which is what bounds it on one core).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import re
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.remote.counters import Counters
from gtalign_jax.rewards.judges.base import JudgeRequest
from gtalign_jax.rewards.judges.http import HttpJudgeConfig, make_http_judge

_BODY = json.dumps(
    {
        "choices": [{"finish_reason": "stop", "message": {"content": "It is equal.\n\\boxed{1}"}}],
        "usage": {"prompt_tokens": 300, "completion_tokens": 10},
    }
)
_ANSWER = (
    f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(_BODY)}\r\n\r\n{_BODY}"
).encode()


@exit_on_user_error
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("requests", 2048), ("concurrency", 512), ("endpoints", 1), ("server_ms", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args(argv)
    for name, value in vars(flags).items():
        if value < 1:
            raise UserError(f"--{name}={value}: must be at least 1")
    print(json.dumps(measure(flags.requests, flags.concurrency, flags.server_ms / 1e3, flags.endpoints)))


def measure(requests: int, concurrency: int, server_s: float, endpoints: int) -> dict[str, Any]:
    """The fields of the line. Starts and stops the server processes."""
    servers = [_start(server_s) for _ in range(endpoints)]
    try:
        stats = Counters()
        urls = tuple(f"http://127.0.0.1:{port}/v1" for _, _, port in servers)
        config = HttpJudgeConfig(endpoints=urls, model="bench", concurrency=concurrency)
        judge = make_http_judge(config, stats)
        judge(_requests(1, "warm-up"))
        clock, cpu = time.perf_counter(), time.process_time()
        verdicts = judge(_requests(requests, "timed"))
        seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
    finally:
        peaks = [_stop(process, pipe) for process, pipe, _ in servers]
    scored = sum(verdict.score == 1.0 for verdict in verdicts)
    return {
        "case": "judge",
        "requests": requests,
        "scored": scored,
        "missing": requests - scored,
        "retries": int(stats.numbers().get("retries", 0)),
        "concurrency": concurrency,
        "in_flight": sum(peaks),
        "requests_per_s": round(requests / seconds, 1),
        "limit_per_s": round(concurrency / server_s, 1),
        "cpu_ms_per_request": round(1e3 * cpu / requests, 2),
    }


def _requests(count: int, name: str) -> list[JudgeRequest]:
    text = "A response of ordinary length, as a policy would write it. " * 25
    return [JudgeRequest("math", "How many?", f"{text}{name} {i}: 42", "42") for i in range(count)]


def _start(server_s: float) -> tuple[BaseProcess, Connection, int]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_server, args=(theirs, server_s), daemon=True)
    process.start()
    return process, ours, ours.recv()


def _stop(process: BaseProcess, pipe: Connection) -> int:
    """The most requests the server held at once."""
    pipe.send("stop")
    peak = pipe.recv()
    process.join()
    return peak


def _run_server(pipe: Connection, server_s: float) -> None:
    asyncio.run(_serve(pipe, server_s))


async def _serve(pipe: Connection, server_s: float) -> None:
    held = {"now": 0, "peak": 0}

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = re.search(rb"(?i)content-length: (\d+)", head)
                assert length is not None  # our client says it
                await reader.readexactly(int(length[1]))
                held["now"] += 1
                held["peak"] = max(held.values())
                await asyncio.sleep(server_s)
                held["now"] -= 1
                writer.write(_ANSWER)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=2048)
    pipe.send(server.sockets[0].getsockname()[1])
    await asyncio.to_thread(pipe.recv)
    server.close()
    pipe.send(held["peak"])


if __name__ == "__main__":
    main(sys.argv[1:])
