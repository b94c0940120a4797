"""Shared set-up: CPU with eight fake devices, a quick compiler, and the folder of recorded values."""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads wait for one another by spinning
# Nearly all the time of these tests is spent compiling programs that run once on a handful of numbers; where
# GTALIGN_JUDGE names a real model, it is spent in the programs.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "0" if "GTALIGN_JUDGE" in os.environ else "1")
# Of a flag that is given twice the last counts.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
# The pinned jaxlib, because XLA ends a process for a flag that it does not know.
if version("jaxlib").startswith("0.10.") and "GTALIGN_JUDGE" not in os.environ:
    # Its older code generator is several times quicker, and one thread of it leaves a worker its core.
    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
        + os.environ["XLA_FLAGS"]
    )

import importlib.util
import pathlib
import shutil
import signal

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gtalign_jax.models.transformer import forward, init_params, unembed

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("suite")

REPO = pathlib.Path(__file__).resolve().parent.parent


def pytest_configure(config):
    """pytest-xdist hands out modules in our order, not by their number of tests."""
    config.option.loadscopereorder = False
    # A shell starts what it runs in the background deaf to Ctrl-C, and so would be the runs started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Whole runs, which are at the root, come first: met last, the longest would leave one worker idle."""
    items.sort(key=lambda item: len(item.path.parts))


MAPS = pathlib.Path("/proc/self/maps")  # Linux lets a process have 65,530 of them


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Every compiled program takes a few memory maps; a worker that ran out would crash in the compiler."""
    yield
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real datasets and golden values; its absence skips the test with the reason."""
    folder = pathlib.Path(os.environ.get("GTALIGN_SHARED", REPO.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set GTALIGN_SHARED to the folder with data/ and golden/")
    return folder


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


def _installed(package):
    """Skip where a client is not installed; importing it here would read the environment too early."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: gtalign-jax[gs,s3]")


@pytest.fixture(scope="session")
def emulator():
    """The handler of Google's store, emulated; tests skip where its client is not installed."""
    _installed("gcsfs")
    from tests import stores

    with stores.google() as handler:
        yield handler


@pytest.fixture
def gs(emulator):
    """The URL of a bucket in it."""
    yield "gs://a-bucket"
    emulator.refusal = 0


@pytest.fixture(scope="session")
def amazon():
    """The URL of a bucket in Amazon's store, mocked; tests skip where its client is not installed."""
    _installed("s3fs")
    from tests import stores

    with stores.amazon() as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium. Each module has its own: its driver's event loop is this thread's while it lives."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on the PATH: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium)
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
