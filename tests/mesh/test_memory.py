"""What a program needs is compared with what is free before it runs."""

import jax
import jax.numpy as jnp
import pytest

from gtalign_jax.errors import UserError
from gtalign_jax.mesh import memory

N = 256


def lowered():
    """Takes one array of N x N, makes two others on the way, and returns one."""
    array = jax.ShapeDtypeStruct((N, N), jnp.float32)
    return jax.jit(lambda x: jnp.sort(x @ x, axis=0) @ x).lower(array)


def test_a_program_that_does_not_fit_is_one_line_with_its_mend(monkeypatch):
    taken = memory.taken(lowered().compile())
    assert 2 * 4 * N * N <= taken <= 5 * 4 * N * N
    monkeypatch.setattr(memory, "free_bytes", lambda: taken)
    assert memory.compile_to_fit(lowered(), "update", "raise config.x") is not None
    monkeypatch.setattr(memory, "free_bytes", lambda: taken - 1)
    with pytest.raises(
        UserError, match="^out of memory: update needs 0.0 GiB .* raise config.x, set "
    ) as caught:
        memory.compile_to_fit(lowered(), "update", "raise config.x")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(memory, "free_bytes", lambda: None)  # not known: it is tried
    assert memory.compile_to_fit(lowered(), "update", "raise config.x") is not None


def test_the_hosts_memory_is_shared_by_its_devices(monkeypatch, tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       24000000 kB\nMemAvailable:   16000000 kB\n")
    monkeypatch.setattr(memory, "_HOST", meminfo)
    assert memory.free_bytes() == 16000000 * 1024 / jax.local_device_count()
    meminfo.unlink()
    assert memory.free_bytes() is None


def test_results_in_the_place_of_arguments_take_nothing():
    array = jax.ShapeDtypeStruct((N, N), jnp.float32)
    program = jax.jit(lambda x: x + 1, donate_argnums=0).lower(array).compile()
    assert memory.taken(program) < 4 * N * N
