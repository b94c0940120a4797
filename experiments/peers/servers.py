"""Servers in processes of their own: ours, `transformers serve`, and vLLM where `make vllm` installed it."""

from __future__ import annotations

import contextlib
import http.client
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

import psutil

from experiments.peers import launch
from gtalign_jax.run.signals import ended_by_sigterm
from gtalign_jax.serving.server.access import VARIABLE as KEYS

START_S = 300.0
_NOTHING: Mapping[str, str] = {}
VLLM = ".venv-vllm"
_VLLM_FLAGS = (
    "--dtype=float32",
    "--no-enable-chunked-prefill",
    "--enforce-eager",
    "--no-enable-prefix-caching",
)


class Server:
    """A server that answers. port: at 127.0.0.1. more: variables of its environment."""

    def __init__(
        self, command: Sequence[str], port: int, log: pathlib.Path, more: Mapping[str, str] = _NOTHING
    ) -> None:
        self.port, self._name, self._log = port, command[0], log
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", KEYS: "", **more}  # all may ask
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [*command], env=env, stdout=file, stderr=file, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers; RuntimeError with the end of its log when it does not."""
        until = time.monotonic() + START_S
        while self.get("/health") is None:
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{self._name} did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.2)

    def get(self, path: str) -> str | None:
        """The text at a path; None while nobody answers there."""
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            line.request("GET", path)
            answer = line.getresponse()
            return answer.read().decode() if answer.status == 200 else None
        except OSError:
            return None
        finally:
            line.close()

    def memory(self) -> int:
        """Bytes that its processes hold."""
        first = psutil.Process(self._process.pid)
        return sum(process.memory_info().rss for process in (first, *first.children(recursive=True)))

    def close(self) -> None:
        """End it, its own processes with it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def opened(command: Sequence[str], port: int, env: Mapping[str, str] = _NOTHING) -> Iterator[Server]:
    """The server of a command, until the context ends, be it by SIGTERM."""
    with tempfile.TemporaryDirectory() as folder, ended_by_sigterm(""):
        server = Server(command, port, pathlib.Path(folder) / "log.txt", env)
        try:
            server.wait()
            yield server
        finally:
            server.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ours(folder: pathlib.Path, *flags: str) -> contextlib.AbstractContextManager[Server]:
    """`experiments.serve` on a model folder."""
    port = free_port()
    command = [sys.executable, "-m", "experiments.serve", f"--model={folder}", "--name=bench"]
    return opened([*command, f"--port={port}", *flags], port)


def transformers_serve(
    folder: pathlib.Path, peers: str, *flags: str
) -> contextlib.AbstractContextManager[Server]:
    """`transformers serve` on the same; its environment is made in `peers` where it is missing."""
    port, program = free_port(), launch.python_of("transformers_serve", peers).with_name("transformers")
    command = [str(program), "serve", str(folder), "--device=cpu", "--dtype=float32", f"--port={port}"]
    return opened([*command, *flags], port)


def vllm_python(home: str) -> pathlib.Path | None:
    """The interpreter of vLLM's environment; None where `home` is empty, or, which is said, holds none."""
    if not home:
        return None
    path = pathlib.Path(home).expanduser().absolute() / "bin" / "python"
    if (path.parent.parent / ".installed").is_file():
        return path
    print(f"{home}: no vLLM there, so without it; `make vllm` installs it", file=sys.stderr)
    return None


def vllm(
    folder: pathlib.Path, python: pathlib.Path, room: int, *flags: str
) -> contextlib.AbstractContextManager[Server]:
    """vLLM on the same, with a thread on every core. room: tokens of a prompt and its completion."""
    port, cache = free_port(), 2**30
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))  # by itself it leaves one out
    module = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    about = [f"--port={port}", "--host=127.0.0.1", "--served-model-name=bench", f"--max-model-len={room}"]
    command = [*module, *about, f"--kv-cache-memory-bytes={cache}", *_VLLM_FLAGS, *flags]
    return opened(command, port, {"VLLM_CPU_OMP_THREADS_BIND": cores})
