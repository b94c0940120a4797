"""Kill a run at random moments, start it again each time, and prove that it ends with the same bytes.

    python -m experiments.check_kills --config=configs/quickstart.py:tiny --workdir=runs/kills --kills=20

Runs the job twice undisturbed (the first fills a cache of compiled programs, and both must agree), then
--kills times with SIGKILL to its process group at a moment drawn uniformly between its first phase and its
end, in seconds of its own processor time (a busy machine then moves no kill to an earlier step). The same
command is then run until it ends, and the export, rollouts, metrics (but for times), summary and steering
examples are compared with those of the undisturbed run. A checkpoint is saved after every step, so that many
kills meet an asynchronous save. Other flags (--config.a.b=v) go to the job. One line a kill, a JSON line at
the end; exits with 1 when any run differs. WORKDIR holds the folders `cold` (the first run), `undisturbed`
and `kill_<n>` (removed when identical).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

from gtalign_jax import jsonl
from gtalign_jax.config import parse_command, writable_directory
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.files import paths

CLOCK = ("time", "tokens_per_s", "compile/programs")  # metrics that depend on when a run was interrupted
COMPARED = ("hf", "rollouts", "summary.json", "steering.jsonl")
CACHE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
POLL_S = 0.01


@exit_on_user_error
def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a new folder for all runs")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    flags, job = parser.parse_known_args(argv)
    parse_command(["train", *job], {})  # a mistake in the job's flags is one line, before anything runs
    paths.local(flags.workdir, "--workdir")
    folder = writable_directory(flags.workdir, "workdir")
    if any(folder.iterdir()):
        raise UserError(f"--workdir={folder}: is not empty; name a new folder")
    job = [*job, "--config.checkpoint.every=1"]
    finish(job, folder / "cold", folder)
    span = finish(job, folder / "undisturbed", folder)
    cold = differences(folder / "cold", folder / "undisturbed")
    same = f"differs in {', '.join(cold)}" if cold else "is identical"
    print(f"undisturbed: {span:.1f} s from first phase to end; the first of the two {same}", flush=True)
    moments, wrong, saving = random.Random(flags.seed), 0, 0
    for number in range(flags.kills):
        workdir = folder / f"kill_{number}"
        moment, where = kill_once(job, workdir, folder, span, moments)
        finish(job, workdir, folder)
        found = differences(folder / "undisturbed", workdir)
        wrong, saving = wrong + bool(found), saving + ("save" in where)
        verdict = f"DIFFERS in {', '.join(found)}" if found else "identical"
        print(f"kill {number + 1:2d}  {moment:5.1f} s  {where:44s}  {verdict}", flush=True)
        if not found:
            shutil.rmtree(workdir)
    counts = {"kills": flags.kills, "during_a_save": saving, "identical": flags.kills - wrong}
    print(json.dumps(counts | {"undisturbed_twice_identical": not cold}))
    if wrong or cold:
        sys.exit(1)


def start(job: list[str], workdir: pathlib.Path, folder: pathlib.Path) -> subprocess.Popen:
    """The job in a process group of its own; what it says goes to `log.txt` beside the run folders."""
    env = os.environ | CACHE | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    command = [sys.executable, "-m", "experiments.train", *job, f"--workdir={workdir}"]
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def first_phase(process: subprocess.Popen, workdir: pathlib.Path) -> bool:
    """Wait until the run has opened its checkpoints; False when it ended before."""
    while not (workdir / "checkpoints").is_dir():
        if process.poll() is not None:
            return False
        time.sleep(POLL_S)
    return True


def finish(job: list[str], workdir: pathlib.Path, folder: pathlib.Path) -> float:
    """Run the job to its end; returns the processor seconds since its first phase began."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start(job, workdir, folder)
    try:
        began = processor_s(process) if first_phase(process, workdir) else 0.0
        code = process.wait()
    finally:
        kill_group(process)
    if code:
        raise UserError(f"{workdir}: the run ended with status {code}; see {folder / 'log.txt'}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime - began


def processor_s(process: subprocess.Popen) -> float:
    """Processor seconds a run has taken so far; infinite when it is over."""
    try:
        times = psutil.Process(process.pid).cpu_times()
    except psutil.NoSuchProcess:
        return math.inf
    return times.user + times.system if process.poll() is None else math.inf


def kill_once(
    job: list[str], workdir: pathlib.Path, folder: pathlib.Path, span: float, moments: random.Random
) -> tuple[float, str]:
    """(moment after the first phase began, where that was) of a kill; drawn again if the run was over."""
    while True:
        process, moment = start(job, workdir, folder), moments.uniform(0.0, span)
        try:
            until = moment + (processor_s(process) if first_phase(process, workdir) else 0.0)
            while processor_s(process) < until:
                time.sleep(POLL_S)
        finally:
            alive = kill_group(process)
        if alive:
            return moment, whereabouts(workdir)
        if process.returncode:
            raise UserError(f"{workdir}: ended with {process.returncode}; see {folder / 'log.txt'}")
        shutil.rmtree(workdir)


def kill_group(process: subprocess.Popen) -> bool:
    """SIGKILL the process and all it started; whether it was still running."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def whereabouts(workdir: pathlib.Path) -> str:
    """What a killed run was doing, told from the files it left."""
    lines = jsonl.read(workdir / "metrics.jsonl")
    last = f"{lines[-1]['phase']} step {lines[-1]['step']}" if lines else "the start"
    marks = {
        "figures": "report",
        "hf": "steering examples or report",
        ".hf.*.incomplete": "export",
        "rollouts/aligned_*": "export",
        "rollouts/sft_*": "alignment",
    }
    at = next((name for mark, name in marks.items() if any(workdir.glob(mark))), "cold start")
    saving = any(workdir.glob("checkpoints/*/*orbax-checkpoint-tmp*"))
    return f"{at}, after {last}" + (", in a save" if saving else "")


def differences(expected: pathlib.Path, found: pathlib.Path) -> list[str]:
    """Files that are not the same bytes in both runs, and `metrics.jsonl` when more than times differ."""
    a, b = digests(expected), digests(found)
    names = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    same = steps(expected) == steps(found)
    return names if same else [*names, "metrics.jsonl"]


def digests(workdir: pathlib.Path, names: Sequence[str] = COMPARED) -> dict[str, str]:
    """SHA-256 of the files and folders of these names; by default, what two runs of a job have in common."""
    paths = [path for name in names for path in [workdir / name, *(workdir / name).rglob("*")]]

    def digest(path: pathlib.Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    return {str(path.relative_to(workdir)): digest(path) for path in paths if path.is_file()}


def steps(workdir: pathlib.Path) -> list[dict]:
    """The metrics of every step but for those of the clock."""
    lines = jsonl.read(workdir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


if __name__ == "__main__":
    main(sys.argv[1:])
