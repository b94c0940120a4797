"""Shared set-up: CPU with eight fake devices, a quick compiler, and the folder of recorded values."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nearly all the time of these tests is spent compiling programs that run once on a handful of numbers.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import pathlib

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("suite")

REPO = pathlib.Path(__file__).resolve().parent.parent


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
