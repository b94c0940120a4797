"""Chromium, and a page of a server whose answers a test writes."""

import contextlib
import shutil

import pytest

from gtalign_jax.game.pricing import POLICIES
from gtalign_jax.serving.server.access import Keys
from gtalign_jax.serving.server.app import Service
from gtalign_jax.serving.server.ask import ApiError, Bounds
from gtalign_jax.serving.server.parts import Part, Usage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
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


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium. Each module has its own: its driver's event loop is this thread's while it lives."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM)
        yield running
        running.close()


@pytest.fixture
def visit(browser):
    """visit(address, **context): a page there. A fault in its scripts, or an error they log, is in `faults`,
    which must be empty in the end."""
    faults, contexts = [], []

    def open_page(address, **context):
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
        page.faults = faults
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # The server may be gone before the page, which then asks it in vain.
    assert not [fault for fault in faults if not fault.endswith("ERR_CONNECTION_REFUSED")]
