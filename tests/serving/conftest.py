"""A model taught a few sequences by heart, and a server on a free port, in a thread of the test's process."""

import contextlib
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gtalign_jax.models.transformer import forward, init_params, unembed
from gtalign_jax.serving.app import make_app
from gtalign_jax.serving.connections import Patience, bind, make_server


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


def _teach(engine, rows):
    """Parameters of the engine's model that know these rows of token ids by heart."""
    config, length = engine.model_config, np.array([len(row) for row in rows])
    tokens = np.zeros((len(rows), length.max()), np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = values
    mask = np.arange(length.max() - 1) < (length - 1)[:, None]
    optimizer = optax.adam(3e-3)

    def loss(params):
        logits = unembed(params, config, forward(params, config, tokens, length))
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.sum(each * mask) / jnp.sum(mask)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, opt_state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), length=150)

    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    (trained, _), losses = train(params)
    assert losses[-1] < 0.1
    return trained


@pytest.fixture(scope="session")
def teach():
    """teach(engine, rows): see `_teach`."""
    return _teach
