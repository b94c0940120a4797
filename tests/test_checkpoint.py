"""Checkpoints: to the bit, onto another mesh, and past a damaged newest one."""

import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gtalign_jax import checkpoint
from gtalign_jax.errors import UserError


def state(step):
    return {
        "w": jnp.arange(8.0) * step,
        "half": jnp.full((2, 3), step, jnp.bfloat16),
        "rng": jax.random.key(step),
        "step": jnp.int32(step),
    }


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def saved(tmp_path):
    manager = checkpoint.open_manager(tmp_path / "phase", keep=2)
    for step in (1, 2, 3):
        checkpoint.save(manager, step, state(step), {"step": step})
    manager.wait_until_finished()
    return manager


def test_newest_comes_back_to_the_bit_and_old_ones_go(saved):
    step, restored = checkpoint.restore_latest(saved, state(0))
    assert step == 3
    assert sorted(saved.all_steps()) == [2, 3]
    assert_same(restored, state(3))


def test_restores_onto_another_mesh(saved):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    like = state(0) | {
        "w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    }
    _, restored = checkpoint.restore_latest(saved, like)
    assert len(restored["w"].sharding.device_set) == 8
    assert_same(restored, state(3))


def damage(manager, step):
    for path in pathlib.Path(manager.directory, str(step)).rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def test_damaged_newest_falls_back_with_a_warning(saved, caplog):
    damage(saved, 3)
    with caplog.at_level(logging.WARNING):
        step, restored = checkpoint.restore_latest(saved, state(0))
    assert step == 2
    assert_same(restored, state(2))
    assert "/3 is damaged" in caplog.text
    checkpoint.drop_after(saved, step)
    checkpoint.save(saved, 3, state(3), {})
    saved.wait_until_finished()
    assert checkpoint.restore_latest(saved, state(0))[0] == 3


def test_all_damaged_is_an_error_and_an_empty_folder_is_none(saved, tmp_path):
    for step in (2, 3):
        damage(saved, step)
    with pytest.raises(UserError, match="no checkpoint can be read"):
        checkpoint.restore_latest(saved, state(0))
    empty = checkpoint.open_manager(tmp_path / "new", keep=1)
    assert checkpoint.restore_latest(empty, state(0)) is None
