"""What a program needs is compared with what is free before it runs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gtalign_jax.errors import UserError
from gtalign_jax.mesh import memory
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh

N = 256
PURPOSE = memory.Purpose("update", "raise config.x")


def lowered():
    """Takes one array of N x N, makes two others on the way, and returns one."""
    array = jax.ShapeDtypeStruct((N, N), jnp.float32)
    return jax.jit(lambda x: jnp.sort(x @ x, axis=0) @ x).lower(array)


def test_a_program_that_does_not_fit_is_one_line_with_its_mend(monkeypatch):
    taken = memory.taken(lowered().compile())
    assert 2 * 4 * N * N <= taken <= 5 * 4 * N * N
    monkeypatch.setattr(memory, "free_bytes", lambda: taken)
    assert memory.compile_to_fit(lowered(), PURPOSE) is not None
    monkeypatch.setattr(memory, "free_bytes", lambda: taken - 1)
    with pytest.raises(UserError, match="^out of memory: update needs 0.0 GiB .* raise config.x$") as caught:
        memory.compile_to_fit(lowered(), PURPOSE)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(memory, "free_bytes", lambda: taken + 4)
    with pytest.raises(UserError, match="needs 0.0 GiB"):  # its argument is not there yet
        memory.compile_to_fit(lowered(), PURPOSE, beside=5.0)
    monkeypatch.setattr(memory, "free_bytes", lambda: None)  # not known: it is tried
    assert memory.compile_to_fit(lowered(), PURPOSE) is not None


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


def more_than_there_is():
    jax.jit(lambda: jnp.zeros(2**44))().block_until_ready()


def no_more():
    raise MemoryError("Unable to allocate 9 TiB")


@pytest.mark.parametrize("ask", [more_than_there_is, no_more])
def test_memory_that_runs_out_on_the_way_ends_in_the_same_line(ask):
    with pytest.raises(UserError) as caught, memory.told(PURPOSE):
        ask()
    said = str(caught.value)
    assert said.startswith("out of memory: update (") and said.endswith("GiB free; raise config.x")
    assert "allocat" in said and "\n" not in said


def test_another_fault_stays_what_it_is():
    with pytest.raises(RuntimeError, match="^INVALID_ARGUMENT"), memory.told(PURPOSE):
        raise RuntimeError("INVALID_ARGUMENT: something else")


def test_what_waits_in_the_hosts_memory_takes_none_of_a_devices():
    mesh = make_mesh(MeshConfig(fsdp=4, data=2))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    split = jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=rows)
    away = jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=rows.with_memory_kind("pinned_host"))
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert memory.device_bytes({"a": split, "b": (away, key, jnp.zeros(N))}) == N * N
