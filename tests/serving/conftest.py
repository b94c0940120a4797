"""A server on a free port, in a thread of the test's process, and a model that is taught in a few seconds."""

import contextlib
import threading
import time

import pytest

from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.serving.server.app import make_app
from gtalign_jax.serving.server.connections import Patience, bind, make_server


@contextlib.contextmanager
def _serving(service, patience=None, drain_s=10):
    server, listening = make_server(make_app(service), patience or Patience(), drain_s), bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    server.address = listening.getsockname()
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serving():
    """serving(service, patience, drain_s): a context manager; it gives uvicorn's server, with `address`."""
    return _serving


@pytest.fixture(scope="session")
def small_engine():
    """small_engine(texts, slots, budget): a model without parameters whose tokenizer knows the texts."""

    def build(texts, slots, budget):
        tokenizer = train_tokenizer([*texts] * 3, 431)
        config = ModelConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            initializer_range=0.1,
        )
        buckets = BucketConfig(prompt=(64, slots), completion=(budget,))
        return Engine(tokenizer, config, (tokenizer.eos_token_id,), buckets=buckets)

    return build
