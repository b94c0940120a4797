"""Checkpoints: to the bit, onto another mesh, past a damaged newest one and a kill in the middle."""

import logging
import math
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gtalign_jax.errors import UserError
from gtalign_jax.run import checkpoint, checksums


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
    like = state(0) | {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))}
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


# --- which stay, and what comes with them --------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "stay", "best"),
    [
        ([0.1, 0.9, 0.3, 0.2, 0.4], [2, 5], 2),
        ([0.1, 0.2, 0.3, 0.4, 0.5], [5], 5),
        ([0.1, math.nan, 0.5, None, 0.2], [3, 5], 3),
    ],
)
def test_the_best_stay_beside_the_newest(tmp_path, rewards, stay, best):
    manager = checkpoint.open_manager(tmp_path, keep=1, keep_best=1, best="reward/welfare")
    for step, reward in enumerate(rewards, 1):
        metrics = {"loss": -step} | ({} if reward is None else {"reward/welfare": reward})
        checkpoint.save(manager, step, {"w": jnp.float32(step)}, {}, metrics)
    manager.wait_until_finished()
    manager.close()
    again = checkpoint.open_manager(tmp_path, keep=1, keep_best=1, best="reward/welfare")
    assert sorted(again.all_steps()) == stay
    assert checkpoint.best_step(again) == best
    assert float(checkpoint.restore(again, best, {"w": jnp.float32(0)})["w"]) == best


def test_keeping_the_best_needs_a_name(tmp_path):
    with pytest.raises(UserError, match="checkpoint.best must name a metric"):
        checkpoint.open_manager(tmp_path, keep=1, keep_best=2)


def test_config_and_data_position_come_back(tmp_path):
    meta = {"config": {"seed": 3, "tasks": ["math"]}, "data": {"step": 7, "seed": 0}, "normaliser": None}
    manager = checkpoint.open_manager(tmp_path, keep=1)
    checkpoint.save(manager, 7, {"w": jnp.zeros(2)}, meta)
    manager.wait_until_finished()
    assert checkpoint.read_meta(manager, 7) == meta
    assert checkpoint.best_step(manager) == 7
    for path in (tmp_path / "7" / "meta").rglob("*"):
        path.unlink()
    with pytest.raises(UserError, match="/7: its meta cannot be read") as error:
        checkpoint.read_meta(manager, 7)
    assert "\n" not in str(error.value)


# --- killed in the middle ------------------------------------------------------------------------

# Saves steps without end; a copy of itself is killed at each of the given moments after a save began.
SAVER = """
import os, signal, sys, threading, time, pathlib
import jax, jax.numpy as jnp
from gtalign_jax.run import checkpoint, checksums

def save_until_killed(folder, delay):
    manager = checkpoint.open_manager(folder, keep=2)
    for step in range(1, 100):
        state = {"w": jnp.full((300, 10000), step, jnp.float32), "step": jnp.int32(step)}
        checkpoint.save(manager, step, state, {"step": step})
        if step == 3:  # two are whole: this one is being written
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

for delay in map(float, sys.argv[2:]):
    child = os.fork()  # before JAX has a thread of its own: it is not imported a second time
    if child == 0:
        save_until_killed(pathlib.Path(sys.argv[1], str(delay)), delay)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""
DELAYS = (0.0, 0.01, 0.03, 0.08, 0.2)


def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path):
    subprocess.run([sys.executable, "-c", SAVER, tmp_path, *map(str, DELAYS)], check=True, timeout=120)
    like = {"w": jnp.zeros((300, 10000)), "step": jnp.int32(0)}
    assert list(tmp_path.glob("*/*orbax-checkpoint-tmp*")), "no kill met a save"
    for delay in DELAYS:
        manager = checkpoint.open_manager(tmp_path / str(delay), keep=2)
        step, restored = checkpoint.restore_latest(manager, like)
        assert step >= 2 and int(restored["step"]) == step, delay
        np.testing.assert_array_equal(restored["w"], np.full((300, 10000), step, np.float32))
        checkpoint.drop_after(manager, step)
        checkpoint.save(manager, step + 1, {"w": like["w"], "step": jnp.int32(step + 1)}, {})
        manager.wait_until_finished()
        assert checkpoint.restore_latest(manager, like)[0] == step + 1
        manager.close()


# --- every file of the newest one, damaged in every way -------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut": cut,
    "deleted": pathlib.Path.unlink,
    "flipped": flip,
}


@pytest.fixture(scope="module", params=["with checksums", "without, as 0.1.0 wrote"])
def two_steps(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "phase"
    manager = checkpoint.open_manager(folder, keep=2)
    for step in (1, 2):
        checkpoint.save(manager, step, state(step), {"step": step}, {"reward": 0.5})
    manager.close()
    sums = folder / "2" / checksums.NAME
    assert sums.is_file()
    if request.param != "with checksums":
        for path in folder.rglob(checksums.NAME):
            path.unlink()
    return folder


def test_a_damaged_file_never_gives_another_state(two_steps, tmp_path):
    summed = (two_steps / "2" / checksums.NAME).is_file()
    names = [path.relative_to(two_steps) for path in (two_steps / "2").rglob("*") if path.is_file()]
    assert len(names) > 5
    # Of a step without checksums no one can tell flipped bits.
    for kind in DAMAGES if summed else set(DAMAGES) - {"flipped"}:
        for number, name in enumerate(names):
            folder = tmp_path / f"{kind}_{number}"
            shutil.copytree(two_steps, folder)
            DAMAGES[kind](folder / name)
            manager = checkpoint.open_manager(folder, keep=2)
            step, found = checkpoint.restore_latest(manager, state(0))
            assert_same(found, state(step))
            if summed and name.parts[1] in ("state", "meta", "metrics"):
                assert step == 1, name
            checkpoint.drop_after(manager, step)
            checkpoint.save(manager, step + 1, state(step + 1), {})
            manager.close()
            manager = checkpoint.open_manager(folder, keep=2)
            assert checkpoint.restore_latest(manager, state(0))[0] == step + 1, (kind, name)
            manager.close()


def test_a_file_where_checkpoints_belong_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints: is a file where checkpoints belong"):
        checkpoint.open_manager(tmp_path / "checkpoints" / "align", keep=1)
    (tmp_path / "align").write_text("")
    with pytest.raises(UserError, match="align: is a file where checkpoints belong"):
        checkpoint.open_manager(tmp_path / "align", keep=1)


def test_a_reader_leaves_a_save_that_is_being_written(saved, tmp_path):
    draft = tmp_path / "phase" / "4.orbax-checkpoint-tmp"
    (draft / "state").mkdir(parents=True)
    reader = checkpoint.open_manager(tmp_path / "phase", keep=1, read_only=True)
    assert checkpoint.restore_latest(reader, state(0))[0] == 3
    reader.close()
    assert (draft / "state").is_dir() and checkpoint.steps_in(tmp_path / "phase") == [2, 3]


def test_a_step_whose_save_was_not_finished_is_not_taken_for_none(tmp_path, caplog):
    manager = checkpoint.open_manager(tmp_path, keep=1)
    (tmp_path / "2").mkdir()
    with pytest.raises(UserError, match=r"no checkpoint can be read \(tried 2\)"):
        checkpoint.restore_latest(manager, state(0))
    assert "its save was not finished" in caplog.text
