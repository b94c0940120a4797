"""From a rollout to its reward: decoded, judged and rewarded, and the lines that record it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gtalign_jax.data.item import Item
from gtalign_jax.errors import UserError
from gtalign_jax.mesh import processes
from gtalign_jax.rewards.features import FeatureBatch, extract
from gtalign_jax.rewards.mutual_welfare import RewardConfig, RewardFn
from gtalign_jax.rewards.tasks import task_of_source
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.run.job import Job
from gtalign_jax.run.progress import stage
from gtalign_jax.run.rollouts import RolloutLine
from gtalign_jax.types import Features, Reward, Rollout

SLOW = 10.0  # seconds that a part of a step may take before it is said what the run waits for


@functools.partial(jax.jit, static_argnums=(0, 2))
def compute_reward(reward_fn: RewardFn, features: Features, config: RewardConfig) -> Reward:
    """The jitted reward of features [B]."""
    return reward_fn(features, config)


@dataclasses.dataclass(frozen=True)
class Share:
    """What one host reads of its share of a rollout: the texts, and the features that follow from them."""

    texts: list[str]
    batch: FeatureBatch


@dataclasses.dataclass(frozen=True)
class Scored:
    """A rollout's texts [B], what was read from them, and the reward (host arrays [B])."""

    texts: list[str]
    items: list[Item]
    batch: FeatureBatch
    reward: Reward


def judge_share(job: Job, rollout: Rollout, items: Sequence[Item]) -> Share | UserError:
    """Decode and judge this host's share of a rollout; waits for the judge. On a thread only where the judge
    uses no device.

    A judge that refuses gives its UserError, for `score` to raise on all hosts: it may refuse one alone.
    """
    rows = engine_lib.completion_ids(rollout.completions)
    mine = processes.part(len(rows))
    texts = [engine_lib.decode_tokens(job.engine, ids) for ids in rows[mine]]
    repeated = _repeat(items, rollout)[mine]
    config = job.settings.features
    try:
        return Share(texts, extract(texts, repeated, job.judge, config, job.consistency, job.tasks))
    except UserError as error:
        return error


def verdicts(job: Job) -> int:
    """Answers that a judge has given this host so far."""
    return int(job.judge_stats.numbers().get("answers", 0))


def judge_stage(
    job: Job, name: str, rollout: Rollout, first: int
) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """The stage of waiting for the verdicts on a rollout; first: `verdicts` when they were asked for."""
    answers = rollout.completions.length.size // jax.process_count()
    return stage(name, answers, after=SLOW, done=lambda: verdicts(job) - first)


def score(
    job: Job, rollout: Rollout, items: Sequence[Item], share: Share | UserError | None = None
) -> Scored:
    """Decode, judge and reward a rollout of P prompts; row p*G + g answers items[p].

    share: `judge_share` of it, where that was begun before. A row without tokens did not come back from its
    server: it is not valid, whatever a judge says of nothing. Raises the UserError of any host's judge.
    """
    if share is None:
        with judge_stage(job, "judge", rollout, verdicts(job)):
            share = judge_share(job, rollout, items)
    shares = []
    for each in processes.all_gather(share):
        if isinstance(each, UserError):
            raise each
        shares.append(each)
    batch = join_batches([each.batch for each in shares])
    written = np.asarray(rollout.completions.length).reshape(-1) > 0
    features = batch.features.replace(valid=batch.features.valid & written)
    batch = dataclasses.replace(batch, features=features)
    reward = jax.device_get(compute_reward(job.reward_fn, features, job.settings.reward))
    texts = [text for each in shares for text in each.texts]
    return Scored(texts, _repeat(items, rollout), batch, reward)


def _repeat(items: Sequence[Item], rollout: Rollout) -> list[Item]:
    """The item of every row."""
    return [item for item in items for _ in range(rollout.completions.length.shape[1])]


def join_batches(parts: Sequence[FeatureBatch]) -> FeatureBatch:
    """The features of consecutive parts of a batch as those of the whole."""
    if len(parts) == 1:
        return parts[0]
    return FeatureBatch(
        features=jax.tree.map(lambda *x: np.concatenate(x), *(part.features for part in parts)),
        answer=np.concatenate([part.answer for part in parts]),
        action=[action for part in parts for action in part.action],
        verdicts=[verdict for part in parts for verdict in part.verdicts],
        chains=[chain for part in parts for chain in part.chains],
    )


def rollout_lines(rollout: Rollout, scored: Scored, step: int) -> list[dict[str, Any]]:
    """The lines of a rollout file; a row that did not come back from its server has none."""
    length = np.asarray(rollout.completions.length).reshape(-1)
    lines = (_line(scored, i, step, int(n)) for i, n in enumerate(length) if n > 0)
    return [line.fields() for line in lines]


def judged_again(job: Job, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of an evaluation on this job's held-out prompts, read, judged and rewarded by this job.

    Every process calls it, with the same lines. UserError where they are not of these prompts.
    """
    items = [item for item in job.test.items for _ in range(job.settings.evaluate.samples)]
    if [item.messages[-1]["content"] for item in items] != [line["input"] for line in lines]:
        raise UserError(
            f"{len(lines)} recorded answers are not those to the {len(job.test.items)} held-out prompts of "
            "config.data; judge them with the config that they were made with"
        )
    texts, first = [line["output"] for line in lines], verdicts(job)
    with stage("judge", len(lines), after=SLOW, done=lambda: verdicts(job) - first):
        batch = extract(texts, items, job.judge, job.settings.features, job.consistency, job.tasks)
    reward = jax.device_get(compute_reward(job.reward_fn, batch.features, job.settings.reward))
    scored = Scored(texts, items, batch, reward)
    return [_line(scored, i, line["step"], line["n_tokens"]).fields() for i, line in enumerate(lines)]


def _line(scored: Scored, i: int, step: int, n_tokens: int) -> RolloutLine:
    """The line of row i; numbers that are not known without a verdict are NaN, and no mean counts them."""
    item, reward, batch = scored.items[i], scored.reward, scored.batch
    features, valid = batch.features, batch.features.valid[i]
    user, llm, welfare, answer, utility = (
        float(x) if valid else float("nan")
        for x in (reward.user[i], reward.llm[i], reward.welfare[i], batch.answer[i], _welfare_of(reward, i))
    )
    return RolloutLine(
        input=item.messages[-1]["content"],
        output=scored.texts[i],
        gts=item.ground_truth,
        source=item.source,
        step=step,
        score=welfare,
        answer_reward=answer,
        format_reward=float(features.format_ok[i]),
        payoff_reward=float(reward.parts["payoff"][i]) if "payoff" in reward.parts else 0.0,
        pareto_score=float(features.frontier[i]),
        user_reward=user,
        llm_reward=llm,
        utility=utility,
        action=batch.action[i],
        n_tokens=n_tokens,
        verdict=batch.verdicts[i],
        seen=item.seen,
        task="" if task_of_source(item.source) == item.task else item.task,
        id=item.name,
    )


def _welfare_of(reward: Reward, i: int) -> float:
    """W of row i, whatever the score is made of."""
    return np.sqrt(reward.user[i] * reward.llm[i])
