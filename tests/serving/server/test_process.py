"""The command as it is started: a folder served by a process of its own, which SIGTERM ends in order."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading

import jax
import openai
import pytest

from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.models import hf
from gtalign_jax.models.transformer import init_params
from tests.small import small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small"
    tokenizer = train_tokenizer(["the payoff of a clear question\n"] * 3, 450)
    config = small_model(len(tokenizer), num_layers=1)
    hf.save_params(init_params(jax.random.key(0), config), config, path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def process(folder, tmp_path):
    """A server that has said where it is: (process, port, lines of its log, the thread that reads them)."""
    keys = tmp_path / "keys"
    keys.write_text("sk-1\n")
    flags = ["--port=0", "--rows=2", "--max_prompt_tokens=64", "--max_new_tokens=2000", f"--keys={keys}"]
    command = [sys.executable, "-u", "-m", "experiments.serve", f"--model={folder}", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    lines, ready = [], threading.Event()

    def read():
        for line in process.stderr:
            lines.append(line.rstrip())
            if "startup complete" in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(120) and process.poll() is None, lines
        (where,) = [line for line in lines if line.startswith("serving small at http://127.0.0.1:")]
        yield process, int(where.removesuffix("/v1").rpartition(":")[2]), lines, reader
    finally:
        process.kill()
        process.wait()
        reader.join()


def test_a_folder_is_served_and_sigterm_lets_an_answer_end(process):
    server, port, lines, reader = process
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sk-1", max_retries=0) as client:
        messages = [{"role": "user", "content": "question"}]
        made = client.chat.completions.create(model="small", messages=messages, max_tokens=5, seed=1)
        assert made.usage.completion_tokens <= 5
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": "clear", "max_tokens": 2000, "stream": True, "seed": 1, "temperature": 2}
    line.request("POST", "/v1/completions", json.dumps(body), {"Authorization": "Bearer sk-1"})
    answer = line.getresponse()
    first = answer.readline()
    server.send_signal(signal.SIGTERM)
    rest = answer.read()
    assert first.startswith(b"data: ") and rest.endswith(b"data: [DONE]\n\n")
    server.wait(60)
    reader.join(60)  # the log's last lines may be under way
    assert server.returncode in (0, -signal.SIGTERM)  # uvicorn gives the signal on when all is done
    logged = [json.loads(one) for one in lines if one.startswith("{")]
    assert [one["status"] for one in logged] == [200, 200]
    assert not any("Traceback" in one or "clear" in one for one in lines)
