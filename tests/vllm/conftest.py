"""A real vLLM on the CPU, in the environment that `make vllm` makes; without it these tests are skipped."""

import http.client
import os
import pathlib
import signal
import socket
import subprocess
import time

import pytest
import torch
import transformers

from configs import quickstart
from gtalign_jax.run.job import make_job

REPO = pathlib.Path(__file__).resolve().parents[2]
VENV = REPO / ".venv-vllm"
ROOM = 512  # tokens of a prompt and its completion that a server takes
START_S = 600.0
FLAGS = f"--served-model-name policy --host 127.0.0.1 --dtype float32 --max-model-len {ROOM} \
--logprobs-mode processed_logprobs --no-enable-chunked-prefill --enforce-eager \
--kv-cache-memory-bytes 134217728".split()


SHOWED = pytest.StashKey[list[str]]()


def pytest_configure(config):
    config.stash[SHOWED] = []


def pytest_terminal_summary(terminalreporter, config):
    """What was measured, for docs/engines.md."""
    if config.stash[SHOWED]:
        terminalreporter.section("what the server showed")
        terminalreporter.write("".join(f"{line}\n" for line in config.stash[SHOWED]))


@pytest.fixture
def showed(request):
    """showed(text) adds a line to the end of the session's output."""
    return lambda text: request.config.stash[SHOWED].append(f"{request.node.name}: {text}")


class Served:
    """A vLLM of its own process group, which can be killed and started again on the same port."""

    def __init__(self, folder: pathlib.Path, log: pathlib.Path) -> None:
        self.folder, self.log = folder, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        env = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
        module = [str(VENV / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
        command = [*module, "--model", str(self.folder), "--port", str(self.port), *FLAGS]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> "Served":
        """Until it answers; fails with the end of its log when it does not."""
        until = time.monotonic() + START_S
        while self.get("/health") is None:
            if self.process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"vLLM did not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.2)
        return self

    def get(self, path: str) -> str | None:
        """The text at a path; None when the server is not there."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        except OSError:
            return None
        finally:
            connection.close()

    def running(self) -> float:
        """Samples that it is writing now."""
        name = "vllm:num_requests_running{"
        lines = (self.get("/metrics") or "").splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="session", autouse=True)
def vllm_is_there():
    if not (VENV / ".installed").is_file():
        pytest.skip(f"no vLLM in {VENV}: run `make vllm`, then `make test-vllm`")
    before = os.environ.get("NO_PROXY")
    os.environ["NO_PROXY"] = "127.0.0.1"
    yield
    os.environ.pop("NO_PROXY") if before is None else os.environ.update(NO_PROXY=before)


@pytest.fixture(scope="module")
def serve(vllm_is_there, tmp_path_factory):
    """serve(folder) → a server that was started from it; killed when its module is done."""
    servers = []

    def start(folder: pathlib.Path) -> Served:
        servers.append(Served(folder, tmp_path_factory.mktemp("vllm") / "log.txt"))
        servers[-1].start()
        return servers[-1].wait()

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def tokenizer(vllm_is_there, tmp_path_factory):
    """That of the tiny quickstart, which its prompts fit with."""
    return make_job(quickstart.get_config("tiny"), tmp_path_factory.mktemp("quickstart")).engine.tokenizer


@pytest.fixture(scope="session")
def write_model(tokenizer):
    """write_model(folder, tied): a Qwen2 of random weights, as transformers makes and saves it."""

    def write(folder: pathlib.Path, tied: bool) -> pathlib.Path:
        torch.manual_seed(0)
        config = transformers.Qwen2Config(
            vocab_size=len(tokenizer) + 4,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=ROOM,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            eos_token_id=tokenizer.eos_token_id,
        )
        transformers.Qwen2ForCausalLM(config).float().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return write
