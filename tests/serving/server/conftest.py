"""The official client of a module's `local`, within its `bounds`, and of a server in front of it."""

import contextlib
import ssl

import openai
import pytest

from gtalign_jax.remote.client import open_client
from gtalign_jax.serving.server.access import Keys
from gtalign_jax.serving.server.app import Service
from gtalign_jax.serving.server.upstream import Upstream


@pytest.fixture(scope="module")
def client_of(serving, bounds):
    """client_of(backend): a context manager."""

    @contextlib.contextmanager
    def opened(backend):
        with serving(Service(backend, Keys(), bounds)) as server:
            host, port = server.address
            with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0) as client:
                yield client

    return opened


@pytest.fixture(scope="module")
def direct(client_of, local):
    with client_of(local) as client:
        yield client


@pytest.fixture(scope="module")
def proxied(client_of, direct, local):
    """The same server behind another that has no model of its own."""
    behind = open_client(str(direct.base_url), "none", 64, 60.0, ssl.create_default_context())
    with client_of(Upstream(behind, local.models)) as client:
        yield client


@pytest.fixture(params=["direct", "proxied"])
def client(request):
    return request.getfixturevalue(request.param)
