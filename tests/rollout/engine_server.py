"""A server of our own engine, in the protocols of vLLM, SGLang and OpenAI, whose answers a test may spoil."""

import contextlib
import http.server
import json
import threading

import jax
import numpy as np

from gtalign_jax.models import hf
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generate
from gtalign_jax.rollout.request import Request

KEY = jax.random.key(5)  # which seeds take the place of


class Model:
    """Answers in the three protocols with the engine; `spoil` may change or replace an answer."""

    def __init__(self, engine, params):
        self.engine, self.params = engine, params
        self.lock, self.seen = threading.Lock(), []
        self.spoil = lambda path, body, answer: answer

    def answer(self, path, body):
        with self.lock:
            self.seen.append((path, body))
            if path == "/v1/completions":
                seeds = range(body["seed"], body["seed"] + body["n"])
                samples = [self.sample(body["prompt"], seed, body["max_tokens"]) for seed in seeds]
                answer = {"choices": [self.choice(body, i, *s) for i, s in enumerate(samples)]}
                answer["usage"] = {"completion_tokens": sum(len(s[0]) for s in samples)}
            elif path == "/generate":
                settings = body["sampling_params"]
                seed, budget = settings["sampling_seed"], settings["max_new_tokens"]
                ids, logp, ended = self.sample(body["input_ids"], seed, budget)
                pairs = [[float(x), int(i), None] for x, i in zip(logp, ids, strict=True)]
                reason = (
                    {"type": "stop", "matched": int(ids[-1])}
                    if ended
                    else {"type": "length", "length": budget}
                )
                answer = {"text": "", "meta_info": {"output_token_logprobs": pairs, "finish_reason": reason}}
            elif body.get("kwargs"):
                self.params = hf.load_params(body["kwargs"]["weights_path"], self.engine.model_config)
                answer = {"results": [None]}
            elif path == "/update_weights_from_disk":
                self.params = hf.load_params(body["model_path"], self.engine.model_config)
                answer = {"success": True, "message": "ok"}
            else:
                answer = {"results": [None]}
        return self.spoil(path, body, answer)

    def sample(self, prompt, seed, budget):
        one = engine_lib.prompt_batch(self.engine, [prompt])
        request = Request(one, KEY, 1, budget, seeds=np.array([[seed]]))
        r = jax.device_get(generate.rollout(self.engine, self.params, request)).completions
        n = int(r.length[0, 0])
        return r.tokens[0, 0, :n], r.logp[0, 0, :n], bool(r.finished[0, 0])

    def choice(self, body, index, ids, logp, ended):
        ids = [int(i) for i in ids]
        texts = [f"token_id:{i}" for i in ids]
        if not body.get("return_tokens_as_token_ids"):
            texts = [self.engine.tokenizer.decode([i]) for i in ids]
        choice = {
            "index": index,
            "finish_reason": "stop" if ended else "length",
            "logprobs": {"tokens": texts, "token_logprobs": [float(x) for x in logp]},
        }
        if body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": body["prompt"]}
        return choice


class Handler(http.server.BaseHTTPRequestHandler):
    """An answer of bytes is sent as it is, (status, headers, text) as an error, anything else as JSON."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.server.model.answer(self.path, body)
        status, headers, text = answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer))
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *args):
        """Silent."""
