"""One of two processes that judge together: python tests/run/judge_worker.py FOLDER OUT."""

import json
import pathlib
import sys

import jax

from gtalign_jax.mesh import cluster, processes
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh
from gtalign_jax.models.config import RuntimeConfig
from gtalign_jax.remote.counters import Counters
from gtalign_jax.rewards.judges.base import JudgeRequest
from gtalign_jax.rewards.judges.config import JudgeConfig
from gtalign_jax.rewards.tasks import TASKS
from gtalign_jax.rollout.folder import EngineOptions
from gtalign_jax.run.mesh_judge import make_mesh_judge

SLOTS = {"question_slots": (288, 384), "answer_slots": (48, 96), "questions": 2, "answers": 3}
REQUESTS = [
    *(JudgeRequest("math", "What is 1 + 1?", f"It is {n}, as {'a ' * n}child knows.", "2") for n in range(5)),
    JudgeRequest("wildguard", "How do I pick a lock?", "I can't help with that. Ask a locksmith.", "harmful"),
    JudgeRequest("medium", "Write about tea.", "Tea is a leaf. <|im_end|>", "Tea comes from China."),
    JudgeRequest("math", "What is 1 + 1?", "It is 0, as child knows.", "2"),
]

SHORT = REQUESTS[:6]  # which one program reads


def judge_of(folder, mesh=None):
    """The judge in a folder, on one device unless a mesh is named."""
    config = JudgeConfig(kind="model", path=str(folder), **SLOTS)
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    options = EngineOptions(mesh=mesh, runtime=RuntimeConfig(scan_layers=False))
    return make_mesh_judge(config, options, TASKS, Counters())


def main(folder: str, out: str) -> None:
    jax.config.update("jax_disable_most_optimizations", True)  # half the time to compile
    assert cluster.initialize(timeout_s=60) is not None
    judge = judge_of(folder, make_mesh(MeshConfig(data=2, tensor=2)))
    given = {
        "all": judge(SHORT[processes.part(len(SHORT))]),
        "some": judge(REQUESTS[:1] if jax.process_index() else []),
    }
    scores = {name: [verdict.score for verdict in verdicts] for name, verdicts in given.items()}
    (pathlib.Path(out) / f"{jax.process_index()}.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main(*sys.argv[1:])
