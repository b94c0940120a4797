"""Teachers for tests: a server with faults that a real one cannot show, and a model that writes words."""

import http.server
import json
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from gtalign_jax.chain.parse import parse_payoff, to_array
from gtalign_jax.chain.prompt import payoff_json
from gtalign_jax.chain.solver import solver_action
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.game.moves import ACTIONS
from gtalign_jax.models import hf
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.transformer import init_params
from gtalign_jax.synthesis.ask import ANALYSIS, COMPONENTS, MATRIX, RESPONSE, THINKING
from gtalign_jax.synthesis.prompts import WANTED
from gtalign_jax.synthesis.truths import matrix

REPO = pathlib.Path(__file__).resolve().parents[2]
WORDS = "ask answer first then help clear the user with this question and wait".split()


def small(**synthesis):
    """A config of six prompts of the embedded tasks."""
    config = quickstart.get_config("tiny")
    config.data.update(tasks=("math", "ambig_qa", "wildguard"), train_per_task=2, test_per_task=2)
    config.synthesis.update({"candidates": 3, "at_once": 2, **synthesis})
    return config


def component_of(text):
    """Which component a prompt asks for."""
    return next(name for name in COMPONENTS if text.endswith(WANTED[name]))


def wise(text, seed):
    """What a teacher may write: right in two of three tries, by its seed."""
    component, rng = component_of(text), np.random.default_rng(seed)
    if component == MATRIX:
        written = payoff_json(matrix(str(rng.choice(ACTIONS)), rng))
        return written if rng.random() < 0.7 else written.replace("DQ_AQ", "DQ_A")
    if component == ANALYSIS:
        payoff, _ = parse_payoff(text[text.rindex('{"DQ_AQ"') : text.rindex("}}") + 2])
        right = solver_action(to_array(payoff))
        return f"The frontier leads to: choose {right if rng.random() < 0.7 else rng.choice(ACTIONS)}."
    said = " ".join(rng.choice(WORDS, 4 + seed % 5))
    return {THINKING: f"I would {said}.", RESPONSE: f"Let me {said}?"}[component]


class Server(http.server.ThreadingHTTPServer):
    """asked: the bodies of all requests. fault: (body, its number) → what to do wrong, or None."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked, self.fault, self.lock = [], lambda body, number: None, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            number = len(self.server.asked)
        fault = self.server.fault(body, number)
        if isinstance(fault, int):
            self.send(json.dumps({"error": "no"}).encode(), fault)
        elif isinstance(fault, bytes):
            self.send(fault)
        else:
            text = wise(body["messages"][-1]["content"], body["seed"]) if fault is None else fault["text"]
            message = {"message": {"content": text}, "finish_reason": (fault or {}).get("end", "stop")}
            self.send(
                json.dumps(
                    {"choices": [message], "usage": {"prompt_tokens": 10, "completion_tokens": 4}}
                ).encode()
            )

    def send(self, data, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A server on loopback that is stopped at the end."""
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield made
        made.shutdown()


@pytest.fixture(scope="session")
def speaker(tmp_path_factory):
    """The folder of a model that writes a few words and ends, whatever it is asked.

    What comes next depends on the token before alone: the embedding is one-hot, attention and MLP add
    nothing, and the head holds the log-probabilities.
    """
    path = tmp_path_factory.mktemp("models") / "speaker"
    words = [f" {word}" for word in WORDS]
    tokenizer = train_tokenizer([" ".join(WORDS) * 3] * 9, 500)
    ids = [tokenizer(word)["input_ids"] for word in words]
    ids = [one for one, *more in ids if not more]
    assert len(ids) > 5
    size = len(tokenizer)
    config = ModelConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        tie_embeddings=False,
    )
    params = jax.tree.map(jnp.zeros_like, init_params(jax.random.key(0), config))
    logits = np.full((size, size), -20.0, np.float32)  # [token before, token]
    logits[:, ids] = np.random.default_rng(0).normal(size=(size, len(ids)))
    logits[ids, tokenizer.eos_token_id] = 1.0
    params |= {
        "embedding": jnp.eye(size),
        "final_norm": {"scale": jnp.ones(size)},
        "unembedding": jnp.asarray(logits.T / np.sqrt(size)),
    }
    hf.save_params(params, config, path)
    tokenizer.save_pretrained(path)
    return path
