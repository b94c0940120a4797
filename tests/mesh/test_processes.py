"""Two and four real CPU processes against one: curves, files and checkpoints."""

import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gtalign_jax.errors import UserError
from gtalign_jax.mesh import cluster, processes
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, shard_tree
from gtalign_jax.models import hf, transformer
from gtalign_jax.models.config import RuntimeConfig, read_config
from gtalign_jax.run import checkpoint

HERE = pathlib.Path(__file__).resolve().parent
WORKER = HERE / "train_worker.py"
_spec = importlib.util.spec_from_file_location("train_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

# processes, devices of each, mesh, phases (every process compiles anew, so not all do all)
RUNS = {
    "two": (2, 2, {"data": 2, "fsdp": 2}, "sft,grpo,ppo"),
    "four": (4, 1, {"fsdp": 2, "tensor": 2}, "sft"),
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(count, devices, args, port):
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "GTALIGN_COORDINATOR": f"127.0.0.1:{port}",
        "GTALIGN_NUM_PROCESSES": str(count),
        "PYTHONPATH": str(HERE.parent.parent),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen([sys.executable, *map(str, args)], env=env | {"GTALIGN_PROCESS_ID": str(i)}, **pipes)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(folder, result, weights after each phase) of one process with one device."""
    folder = tmp_path_factory.mktemp("one")
    hf.save_params(transformer.init_params(jax.random.key(0), worker.MODEL), worker.MODEL, folder / "start")
    return folder, *worker.run(folder, make_mesh(MeshConfig()))


@pytest.fixture(scope="module", params=RUNS)
def several(request, one, tmp_path_factory):
    """(folder, result) of several processes that start from the same model."""
    count, devices, mesh, phases = RUNS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "start").symlink_to(one[0] / "start")
    processes = start(count, devices, [WORKER, folder, json.dumps(mesh), phases], free_port())
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()  # none is left waiting for one that failed
    assert [process.returncode for process in processes] == [0] * count, "\n".join(outputs)
    return folder, json.loads((folder / "result.json").read_text())


def arrays(path):
    with np.load(path) as held:
        return [held[name] for name in held]


def assert_close(a, b, atol=1e-5):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=atol)


def test_several_processes_give_the_curve_of_one(one, several):
    folder, result = several
    assert result["losses"] == pytest.approx(one[1]["losses"], abs=1e-5)
    assert result["losses"][-1] < result["losses"][0]
    assert_close(arrays(folder / "sft.npz"), jax.tree.leaves(one[2]["sft"]))


@pytest.mark.parametrize("phase", ["grpo", "ppo"])
def test_the_updates_of_a_rollout_are_the_same(one, several, phase):
    """One update of GRPO; two mini-batches of PPO with its critic. Metrics and weights agree to 1e-5."""
    folder, result = several
    assert (phase in result) == (len(result["read"]) == 2)
    if phase in result:
        assert result[phase] == pytest.approx(one[1][phase], abs=1e-5)
        assert_close(arrays(folder / f"{phase}.npz"), jax.tree.leaves(one[2][phase]))
        assert ("loss/value" in result[phase]) == (phase == "ppo")
        before = one[2]["sft"] if phase == "grpo" else one[2]["grpo"][0]
        moved = zip(jax.tree.leaves(before), jax.tree.leaves(one[2][phase][0]), strict=True)
        assert max(np.abs(a - b).max() for a, b in moved) > 1e-3


def test_a_host_reads_its_own_slices(one, several):
    """Two copies of the model on two hosts of two devices: all of it each. Split in four: less than half."""
    size = sum(t.nbytes for t in load_file(one[0] / "start" / "model.safetensors").values())
    assert one[1]["read"] == [size]
    read = several[1]["read"]
    if len(read) == 2:
        assert read == [size, size]
    else:
        assert max(read) < 0.5 * size and sum(read) >= size


def test_what_one_host_finds_wrong_with_the_weights_ends_all(several):
    said = several[1]["fault"]
    assert said == [f"model.safetensors: damaged for process {len(said) - 1}"] * len(said)


def test_process_0_writes_the_whole_model(several):
    folder, _ = several
    config = read_config(folder / "hf")
    assert len(list((folder / "hf").glob("*.safetensors"))) > 1
    exported = hf.load_params(folder / "hf", config)
    for ours, theirs in zip(jax.tree.leaves(exported), arrays(folder / "sft.npz"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def went_on(one):
    """(losses, weights) after the step that follows those saved, of one process with its own checkpoint."""
    folder, mesh = one[0], make_mesh(MeshConfig())
    return next_step(folder, mesh, restored(folder, mesh, processes=1)[1])


def restored(folder, mesh, processes):
    """(step, state) of the newest checkpoint of a folder, on a mesh; its meta says how many wrote it."""
    config = read_config(folder / "start", RuntimeConfig(scan_layers=False))
    shardings = shard_tree(transformer.logical_axes(config), mesh, hf.abstract_params(config))
    params = hf.load_params(folder / "start", config, shardings)
    manager = checkpoint.open_manager(folder / "checkpoints", keep=2)
    step, state = checkpoint.restore_latest(manager, worker.start_state(params, shardings, mesh))
    assert checkpoint.read_meta(manager, step) == {"step": step, "processes": processes}
    manager.close()
    for leaf, sharding in zip(jax.tree.leaves(state.policy.params), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == sharding
    return step, state


def next_step(folder, mesh, state):
    """(losses, weights) after one more step from a restored state, which is consumed."""
    config = read_config(folder / "start", RuntimeConfig(scan_layers=False))
    with jax.set_mesh(mesh):
        state, losses = worker.sft(state, config, mesh, range(worker.STEPS, worker.STEPS + 1))
    return losses, jax.device_get(state.policy.params)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=4, tensor=2)], ids=["one", "eight"])
def test_their_run_goes_on_here(several, went_on, mesh):
    """A state saved by several processes is restored by one, to the bit, and its next step is the same."""
    folder, result = several
    mesh = make_mesh(mesh)
    step, state = restored(folder, mesh, processes=len(result["read"]))
    assert step == worker.STEPS == int(state.step)
    assert jax.random.key_data(state.rng).tolist() == jax.random.key_data(jax.random.key(3)).tolist()
    for leaf, saved in zip(jax.tree.leaves(state.policy.params), arrays(folder / "sft.npz"), strict=True):
        np.testing.assert_array_equal(leaf, saved)
    losses, params = next_step(folder, mesh, state)
    assert losses == pytest.approx(went_on[0], abs=1e-5)
    assert_close(jax.tree.leaves(params), jax.tree.leaves(went_on[1]))


# --- joining -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"GTALIGN_NUM_PROCESSES": "1"}, None),
        (
            {
                "GTALIGN_COORDINATOR": "a:1",
                "GTALIGN_NUM_PROCESSES": "4",
                "GTALIGN_PROCESS_ID": "3",
                "SLURM_NTASKS": "8",
                "SLURM_PROCID": "0",
            },
            ("GTALIGN", "a:1", 4, 3),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "pod-0.svc", "JOB_COMPLETION_INDEX": "1", "NNODES": "2"},
            ("Kubernetes", "pod-0.svc:55527", 2, 1),
        ),
        (
            {"MASTER_ADDR": "h", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "0"},
            ("torchrun", "h:29500", 2, 0),
        ),
        ({"MASTER_ADDR": "h", "WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, ("SLURM", "", 0, -1)),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, ("TPU pod", "", 0, -1)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_the_environment_says_who_is_there(env, expected):
    found = cluster.find_cluster(env)
    assert found == (None if expected is None else cluster.Cluster(*expected))


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"GTALIGN_COORDINATOR": "a:1"}, "GTALIGN_NUM_PROCESSES is not"),
        ({"GTALIGN_NUM_PROCESSES": "2"}, "GTALIGN_COORDINATOR .* is not"),
        (
            {"GTALIGN_COORDINATOR": "a:1", "GTALIGN_NUM_PROCESSES": "2", "GTALIGN_PROCESS_ID": "2"},
            "GTALIGN_PROCESS_ID=2: must be below GTALIGN_NUM_PROCESSES=2",
        ),
        (
            {"GTALIGN_COORDINATOR": "a:1", "GTALIGN_NUM_PROCESSES": "two", "GTALIGN_PROCESS_ID": "0"},
            "GTALIGN_NUM_PROCESSES='two'",
        ),
    ],
)
def test_a_gap_in_the_description_is_named(env, message):
    with pytest.raises(UserError, match=message) as error:
        cluster.find_cluster(env)
    assert "\n" not in str(error.value)


def test_an_absent_process_0_is_one_line():
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"process 0 does not answer at {address}") as error:
        cluster.initialize(address, 2, 1, timeout_s=0)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="'here:now': must be host:port"):
        cluster.initialize("here:now", 2, 1, timeout_s=0)


def test_one_process_needs_nobody():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    assert cluster.initialize() is None and processes.is_main()
    assert processes.part(7) == slice(0, 7)
    assert processes.all_gather("x") == ["x"] and processes.from_main(lambda: 3) == 3
    assert processes.total({"a": 2.0}) == {"a": 2.0} and processes.any_process(True)
    np.testing.assert_array_equal(processes.host_rows(16, mesh), np.arange(16))
    rows = np.arange(48).reshape(16, 3)
    placed = processes.global_batch(rows, 16, mesh)
    assert placed.sharding.shard_shape((16, 3)) == (2, 3)
    np.testing.assert_array_equal(processes.fetch(placed), rows)
    with pytest.raises(UserError, match="batch of 12 cannot be split over 8"):
        processes.host_rows(12, mesh)
