"""A run's rollout lines as lines to score, and what their run scored with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gtalign_jax import jsonl
from gtalign_jax.config import build
from gtalign_jax.errors import UserError
from gtalign_jax.files import paths
from gtalign_jax.rewards.features import FeatureConfig
from gtalign_jax.rewards.judges.base import Verdict
from gtalign_jax.rewards.mutual_welfare import RewardConfig
from gtalign_jax.rewards.tasks import task_of_source

DEFAULT = "cobb_douglas"


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """fn: a name of REWARDS or module:function; its numbers, and how features are read."""

    fn: str
    reward: RewardConfig = RewardConfig()
    features: FeatureConfig = FeatureConfig()


def reward_of_run(path: str, fn: str = "") -> ScoreConfig:
    """What the run scored with whose rollouts a file is, with `fn` in place of its reward; else the defaults.

    UserError for a run whose reward is code, which is not called because its config.json names it.
    """
    folder = paths.absolute(path).parent
    recorded = folder.parent / "config.json"
    if folder.name != "rollouts" or not recorded.is_file():
        return ScoreConfig(fn or DEFAULT)
    config = jsonl.read_object(recorded)
    reward = dict(config.get("reward", {}))
    own = str(reward.pop("fn", DEFAULT))
    if ":" in own and not fn:
        raise UserError(f"{path}: the reward of its run is code; name it with --reward={own}")
    features = build(FeatureConfig, config.get("features", {}), "features")
    return ScoreConfig(fn or own, build(RewardConfig, reward, "reward"), features)


def of_rollout(line: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A line of a rollout file as a line to score; its recorded verdict is `verdict`."""
    source, judge = line.get("source"), line.get("judge")
    judge = judge if isinstance(judge, dict) else {"verdict": ""}
    score = judge.get("verdict")
    if not isinstance(source, str) or isinstance(score, bool) or not isinstance(score, int | float | None):
        raise UserError(f"{where}: source must be a string, and judge an object with a verdict")
    return {
        "task": task_of_source(source),
        "completion": line.get("output"),
        "ground_truth": line.get("gts"),
        "verdict": Verdict(score, str(judge.get("reason", ""))),
        "pareto_score": line.get("pareto_score"),
    }
