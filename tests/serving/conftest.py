"""A server on a free port, in a thread of the test's process."""

import contextlib
import threading
import time

import pytest

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
