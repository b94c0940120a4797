"""How many of the 200 pairs a real model on the mesh ranks right: GTALIGN_JUDGE=DIR names its folder.

GTALIGN_JUDGE=DIR python -m pytest -q -s -n 0 tests/run/test_judge_accuracy.py
"""

import os

import jax
import pytest

from gtalign_jax.mesh.sharding import MeshConfig, make_mesh
from gtalign_jax.remote.counters import Counters
from gtalign_jax.rewards.judges.config import JudgeConfig
from gtalign_jax.rewards.tasks import TASKS
from gtalign_jax.rollout.folder import EngineOptions
from gtalign_jax.run.mesh_judge import make_mesh_judge
from tests.rewards.judges import pairs


@pytest.fixture(scope="module")
def judge():
    folder = os.environ.get("GTALIGN_JUDGE")
    if not folder:
        pytest.skip("GTALIGN_JUDGE is not set to the folder of a model, such as fetch_model makes")
    slots = {"question_slots": (448, 640, 1024, 2048), "answer_slots": (96, 256, 512, 1024)}
    config = JudgeConfig(kind="model", path=folder, questions=2, answers=2, **slots)
    options = EngineOptions(mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    return make_mesh_judge(config, options, {name: TASKS[name] for name in pairs.NAMES}, Counters())


def test_the_pairs_are_ranked(judge, shared, capsys):
    made = pairs.make_pairs(shared / "data" / "gtalign")
    share, wrong = pairs.ranked(judge, made)
    numbers = judge.stats.numbers()
    with capsys.disabled():
        print(f"\nmodel judge: {share:.1%} of {len(made)} pairs ranked right; wrong: {dict(wrong)}")
        print(f"{numbers['label_mass'] / numbers['requests']:.1%} on the labels; {numbers['call_s']:.0f} s")
    assert numbers["missing"] == 0
