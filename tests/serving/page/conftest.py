"""A page of a server whose answers a test writes."""

import contextlib

import pytest

from gtalign_jax.game.pricing import POLICIES
from gtalign_jax.serving.server.access import Keys
from gtalign_jax.serving.server.app import Service
from gtalign_jax.serving.server.ask import ApiError, Bounds
from gtalign_jax.serving.server.parts import Part, Usage

BOUNDS = Bounds(224, 8, tuple(POLICIES))
ANYBODY = Keys()


class Scripted:
    """Answers a question with parts, text that is sent in pieces, an error, or a function of the request."""

    models = ("scripted",)

    def __init__(self, **said):
        self.said, self.asked = said, []

    def answers(self, ask):
        self.asked.append(ask)
        found = self.said[ask.prompts[0][-1]["content"]]
        found = found(ask) if callable(found) else found
        if isinstance(found, ApiError):
            raise found
        if isinstance(found, str):
            found = [*(Part(found[i : i + 3]) for i in range(0, len(found), 3)), Part(finish="stop")]
        return [self._answer(found)]

    async def _answer(self, parts):
        yield Part(usage=Usage(prompt=3))
        for part in parts:
            if isinstance(part, ApiError):
                raise part
            yield part

    def ready(self):
        return True

    def numbers(self):
        return {}

    async def close(self):
        pass


@pytest.fixture
def scripted(serving):
    """scripted(question=answer): a context manager that gives (address of the page, backend)."""

    @contextlib.contextmanager
    def start(keys=ANYBODY, **said):
        backend = Scripted(**said)
        with serving(Service(backend, keys, BOUNDS)) as server:
            yield "http://{}:{}/".format(*server.address), backend

    return start
