"""Whole runs whose completions a real vLLM writes: tied embeddings, servers that are killed and come back."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from experiments.check_kills import digests
from gtalign_jax import jsonl

REPO = pathlib.Path(__file__).resolve().parents[2]
STEPS, PROMPTS, G, N = 5, 2, 48, 128  # of two servers each writes one group
PROBES = 4  # samples that a hand-over of weights asks for at a time
ABSENCE_S, STARTING_S = 120.0, 20.0  # a server is away for so long, of which its start takes this or more
FLAGS = {
    "sft.steps": 0,
    "align.steps": STEPS,
    "align.prompts": PROMPTS,
    "align.group_size": G,
    "max_new_tokens": N,
    "policy_optimizer.lr": 1e-3,
    "reward.fn": "lengths:brief",
    "engine.kind": "vllm",
    "engine.model": "policy",
}


@pytest.fixture(scope="module")
def start_run(tmp_path_factory, write_model):
    """start_run(workdir, *servers) begins a run in a process of its own; what it says is in log.txt."""
    model = write_model(tmp_path_factory.mktemp("model"), tied=True)
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": str(pathlib.Path(__file__).parent),
        "XLA_FLAGS": "",
    }

    def begin(workdir: pathlib.Path, *servers) -> subprocess.Popen:
        fields = FLAGS | {"start.path": model, "engine.endpoints": tuple(s.url for s in servers)}
        command = [sys.executable, "-m", "experiments.train", "--config=configs/quickstart.py:tiny"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        with (workdir / "log.txt").open("a") as log:
            options = {"cwd": REPO, "env": env, "stdout": log, "stderr": log}
            return subprocess.Popen([*command, f"--workdir={workdir}"], **options)

    begin.model = model
    return begin


@pytest.fixture(scope="module")
def server(serve, start_run):
    """Started from the run's start model, not from where it hands weights over."""
    return serve(start_run.model)


def finish(process: subprocess.Popen, workdir: pathlib.Path) -> list[dict]:
    """The metrics of the alignment steps of a run that ended well."""
    code = process.wait(timeout=900)
    assert code == 0, (workdir / "log.txt").read_text()[-3000:]
    return [line for line in jsonl.read(workdir / "metrics.jsonl") if line["phase"] == "align"]


def in_a_rollout(process: subprocess.Popen, workdir: pathlib.Path, server) -> None:
    """Wait until a step after the first is being written: more samples than a probe of weights has."""
    metrics = workdir / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n")) or server.running() <= PROBES:
        assert process.poll() is None, (workdir / "log.txt").read_text()[-3000:]
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(start_run, server, tmp_path_factory):
    """(workdir, metrics) of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, finish(start_run(workdir, server), workdir)


def test_the_gap_of_a_tied_model_stays_flat_while_its_weights_move(undisturbed, showed):
    workdir, steps = undisturbed
    assert [line["step"] for line in steps] == [*range(STEPS)]
    assert all(line["sampler/gap"] < 1e-5 for line in steps)
    assert all(line["engine/pushes"] == 1 and "engine/failed" not in line for line in steps)
    assert "engine/unmoved" not in steps[-1] and min(line["grad/norm"] for line in steps) > 0
    assert (workdir / "engine" / "model.safetensors").is_file()
    showed("sampler/gap " + ", ".join(f"{line['sampler/gap']:.1e}" for line in steps))


def test_a_server_that_is_killed_and_away_for_two_minutes_ends_no_run(
    start_run, server, undisturbed, tmp_path_factory, showed
):
    """kill -9 in the middle of a rollout; it comes back with the weights of the start. The same bytes."""
    workdir = tmp_path_factory.mktemp("killed")
    process = start_run(workdir, server)
    in_a_rollout(process, workdir, server)
    server.kill()
    killed = time.monotonic()
    time.sleep(ABSENCE_S - STARTING_S)
    assert process.poll() is None
    server.start()
    server.wait()
    away = time.monotonic() - killed
    assert away > ABSENCE_S
    steps = finish(process, workdir)
    assert digests(workdir) == digests(undisturbed[0])
    retries = sum(line.get("engine/retries", 0) for line in steps)
    assert retries > 0 and not any("engine/failed" in line for line in steps)
    assert all(line["sampler/gap"] < 1e-5 for line in steps)
    showed(f"away for {away:.0f} s, {retries:.0f} retries, no sample lost, the same bytes")


def test_of_two_servers_one_may_be_killed(
    start_run, server, serve, undisturbed, write_model, tmp_path_factory, showed
):
    """In the middle of a rollout, for good; the other, which was started from the run's folder, goes on."""
    workdir = tmp_path_factory.mktemp("two")
    other = serve(write_model(workdir / "engine", tied=True))
    process = start_run(workdir, server, other)
    in_a_rollout(process, workdir, server)
    server.kill()
    steps = finish(process, workdir)
    assert digests(workdir) == digests(undisturbed[0])
    assert sum(line.get("engine/retries", 0) for line in steps) > 0
    assert "is left out for now" in (workdir / "log.txt").read_text()
    assert all(line["sampler/gap"] < 1e-5 and "engine/failed" not in line for line in steps)
    showed("no sample lost, the same bytes")
