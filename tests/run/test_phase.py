"""A phase on a toy state: what a stop, a kill and damage leave on record, and with which status it ends."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.mesh.memory import COLD_START
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh
from gtalign_jax.run.health import HealthConfig
from gtalign_jax.run.lock import locked
from gtalign_jax.run.log import MetricsConfig, RunLog
from gtalign_jax.run.phase import CheckpointConfig, Phase, open_session, run_phase
from gtalign_jax.run.signals import ended_by_sigterm
from gtalign_jax.types import ModelState, TrainState

REPO = pathlib.Path(__file__).resolve().parents[2]
PHASES = ("sft", "align")


def state():
    return TrainState(
        policy=ModelState(params={"w": jnp.zeros(4)}, opt_state={"m": jnp.zeros(1)}),
        critic=None,
        step=jnp.int32(0),
        rng=jax.random.key(0),
    )


def run(workdir, *, at=None, every=2, loss=1.0):
    """Both phases; `at(phase, k)` is called before a step. Returns the sum of the state at the end."""

    def step(name, state, k):
        if at is not None:
            at(name, k)
        policy = state.policy.replace(params={"w": state.policy.params["w"] + k + 1})
        return state.replace(policy=policy), {"loss/sft": loss / (k + 1)}

    log = RunLog(workdir, PHASES, MetricsConfig(), clock=lambda: 0.0)
    mesh = make_mesh(MeshConfig())
    with open_session(workdir, mesh, log, CheckpointConfig(every=every), HealthConfig()) as session:
        now = state()
        for name, after in (("sft", ("align",)), ("align", ())):
            now = run_phase(session, Phase(name, 4, lambda s, k, n=name: step(n, s, k), following=after), now)
    return float(now.policy.params["w"].sum())


def steps(workdir):
    return [(line["phase"], line["step"]) for line in jsonl.read(workdir / "metrics.jsonl")]


ALL = [(name, k) for name in PHASES for k in range(4)]


class Killed(BaseException):
    """The process ends here."""


def test_a_kill_after_a_save_loses_no_line_of_metrics(tmp_path):
    for name, step in (("sft", 2), ("sft", 3), ("align", 2)):

        def end(phase, k, here=(name, step)):
            if (phase, k) == here:
                raise Killed

        with pytest.raises(Killed):
            run(tmp_path, at=end)
    run(tmp_path)
    assert steps(tmp_path) == ALL


def records(workdir):
    files = [workdir / "metrics.jsonl", *(workdir / "tensorboard").rglob("*tfevents*")]
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize("lost", [(4,), (2, 4), None])
def test_damage_in_a_phase_that_is_over_erases_nothing(tmp_path, lost):
    end = run(tmp_path)
    before = records(tmp_path)
    for step in lost or ():
        for path in (tmp_path / "checkpoints" / "sft" / str(step) / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    if lost is None:
        shutil.rmtree(tmp_path / "checkpoints" / "sft")
    assert run(tmp_path) == end
    assert records(tmp_path) == before
    assert steps(tmp_path) == ALL


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_was_stopped_does_not_end_as_one_that_is_complete(tmp_path, number, status):
    def ask(phase, k):
        if (phase, k) == ("align", 0):
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, at=ask)
    assert stopped.value.code == status
    run(tmp_path)
    assert steps(tmp_path) == ALL


class Slow:
    """A metric whose value is there a while after its step has returned."""

    def __array__(self, *_, **__):
        threading.Event().wait(0.2)
        return np.float32(1.0)


def test_tokens_per_second_are_of_results_and_not_of_dispatch(tmp_path):
    def step(state, k):
        return state, {"loss/sft": Slow(), "tokens": 1000}

    log = RunLog(tmp_path, PHASES, MetricsConfig(tensorboard=False))
    checkpoints = CheckpointConfig(every=2)
    with open_session(tmp_path, make_mesh(MeshConfig()), log, checkpoints, HealthConfig()) as session:
        run_phase(session, Phase("sft", 4, step), state())
    rates = [line["tokens_per_s"] for line in jsonl.read(tmp_path / "metrics.jsonl")]
    assert len(rates) == 4 and max(rates) <= 1000 / 0.2


def test_memory_that_runs_out_in_a_step_is_one_line(tmp_path):
    def step(state, k):
        return state, {"loss/sft": jax.jit(lambda: jnp.zeros(2**44 if k == 2 else ()))()}

    log = RunLog(tmp_path, PHASES, MetricsConfig(tensorboard=False))
    phase = Phase("sft", 4, step, takes=COLD_START)
    with (
        open_session(tmp_path, make_mesh(MeshConfig()), log, CheckpointConfig(), HealthConfig()) as session,
        pytest.raises(UserError, match=r"^out of memory: sft update \(.*; raise config.sft.microbatches"),
    ):
        run_phase(session, phase, state())
    assert len(jsonl.read(tmp_path / "metrics.jsonl")) >= 1


NOT_FINITE = """
import importlib.util, pathlib, sys
from gtalign_jax.errors import exit_on_user_error
spec = importlib.util.spec_from_file_location("toy", sys.argv[1])
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
exit_on_user_error(toy.run)(pathlib.Path(sys.argv[2]), every=1, loss=float("nan"))
"""


def test_a_run_that_is_not_finite_ends_with_one_line(tmp_path):
    command = [sys.executable, "-c", NOT_FINITE, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPO)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "sft step 2" in last


AGAIN = """
import importlib.util, pathlib, sys
from gtalign_jax.errors import exit_on_user_error
spec = importlib.util.spec_from_file_location("toy", sys.argv[1])
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
exit_on_user_error(toy.run)(pathlib.Path(sys.argv[2]))
"""


@pytest.mark.parametrize("left", [0, 0.5])
def test_falling_back_is_told_in_lines_and_no_tracebacks(tmp_path, left):
    """Nothing that the reader of checkpoints leaves behind speaks at the end of the process."""
    run(tmp_path)
    for path in (tmp_path / "checkpoints" / "align" / "4" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
    command = [sys.executable, "-c", AGAIN, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert "align/4" in done.stderr  # what is passed over is named
    for noise in ("Traceback", "Exception ignored", "Event loop", "never awaited"):
        assert noise not in done.stderr, done.stderr
    assert steps(tmp_path) == ALL


NO_ROOM = """
import importlib.util, pathlib, resource, sys
import jax, jax.numpy as jnp
import experiments
from gtalign_jax.errors import exit_on_user_error
spec = importlib.util.spec_from_file_location("toy", sys.argv[1])
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
noise = jax.random.normal(jax.random.key(0), (500_000,))
small = toy.state
toy.state = lambda: small().replace(policy=small().policy.replace(opt_state={"m": noise + 0.0}))
if sys.argv[3] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
exit_on_user_error(toy.run)(pathlib.Path(sys.argv[2]), every=1)
"""


def test_a_disk_without_room_for_a_checkpoint_is_one_line_and_with_room_the_run_goes_on(tmp_path):
    def begin(disk):
        command = [sys.executable, "-c", NO_ROOM, __file__, str(tmp_path), disk]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPO)

    full = begin("full")
    # TensorStore's own thread may still find the loop closed that it was to tell; no frame of ours is shown.
    assert full.returncode == 2 and "gtalign_jax/" not in full.stderr, full.stderr
    last = full.stderr.splitlines()[-1]
    assert last.startswith(
        f"error: {tmp_path}/checkpoints/sft: a checkpoint cannot be written (File too large)"
    )
    assert "it takes about 2,000,0" in last
    mended = begin("with room")
    assert mended.returncode == 0, mended.stderr
    assert steps(tmp_path) == ALL


def test_between_phases_a_signal_is_not_swallowed(tmp_path):
    def whole_run():
        with ended_by_sigterm(), locked(tmp_path):
            run(tmp_path)
            assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("went on")

    with pytest.raises(SystemExit) as stopped:
        whole_run()
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not (tmp_path / "run.lock").exists()
