"""Every algorithm with every reward, chosen by name, through a real alignment step; judges may fail."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from gtalign_jax import align
from gtalign_jax import config as config_lib
from gtalign_jax.data import loader
from gtalign_jax.errors import UserError
from gtalign_jax.learning.algorithm import PRESETS
from gtalign_jax.learning.experience import make_experience
from gtalign_jax.learning.update import make_update
from gtalign_jax.mesh.sharding import spread
from gtalign_jax.rewards.judges.base import Verdict
from gtalign_jax.rewards.mutual_welfare import REWARDS, resolve_reward
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.run import groups
from gtalign_jax.run.job import load_start, make_job
from gtalign_jax.run.score import rollout_lines, score
from gtalign_jax.run.settings import make_settings
from gtalign_jax.run.step_metrics import rollout_metrics
from gtalign_jax.types import Rollout

PROMPTS, GROUP = 4, 4
FLAGS = [
    "--config=configs/quickstart.py:tiny",
    f"--config.align.prompts={PROMPTS}",
    f"--config.align.group_size={GROUP}",
    f"--config.sft.chains={GROUP}",
    "--config.model.num_layers=1",
    "--config.start.scan_layers=True",
    "--config.policy_optimizer.warmup=0",  # its first step would not move
    "--workdir=x",
]


def parse(*flags):
    return config_lib.parse_command(["prog", *FLAGS, *flags], {"workdir": ""})[0]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(parse(), tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def start(job):
    """The parameters before the first step; no step takes them away."""
    with jax.set_mesh(job.mesh):
        return load_start(job)


@pytest.fixture(scope="module")
def rollout(job):
    """The teacher's chains as if the policy had written them: they earn rewards that differ."""
    shown = job.demonstrations[:PROMPTS]
    slots = job.settings.max_new_tokens
    tokens, length = loader.pad_completions([row.completions for row in shown], slots)
    prompts = [row.prompt for row in shown]
    prompt = np.zeros((PROMPTS, job.settings.buckets.prompt[0]), np.int32)
    for row, ids in zip(prompt, prompts, strict=True):
        row[: len(ids)] = ids
    mask = np.arange(slots) < length[..., None]
    return Rollout(
        prompt=prompt,
        prompt_length=np.array([len(ids) for ids in prompts], np.int32),
        completion=tokens,
        length=length,
        finished=np.ones_like(length, bool),
        sampler_logp=np.where(mask, -6.0, 0.0).astype(np.float32),
        action_mask=mask,
    )


def items_of(job):
    by_prompt = {tuple(tokens): item for tokens, item in zip(job.train.tokens, job.train.items, strict=True)}
    return [by_prompt[tuple(row.prompt)] for row in job.demonstrations[:PROMPTS]]


def sampled_with(job, rollout):
    scored = score(job, rollout, items_of(job))
    untrained = groups.untrained_tokens(rollout, job.untrained)
    return groups.Sampled(rollout, scored, np.zeros(PROMPTS, bool), untrained)


replaced = dataclasses.replace


@pytest.mark.parametrize("preset", PRESETS)
def test_an_algorithm_takes_every_reward(preset, job, start, rollout, monkeypatch):
    batches = "--config.algorithm.minibatches=2" if PRESETS[preset].minibatches > 1 else "--config.seed=0"
    settings = make_settings(parse(f"--config.align.algorithm={preset}", batches))
    with jax.set_mesh(job.mesh):
        both = align.optimizers(settings)
        update = make_update(job.model, settings.algorithm, *both, 1.0)
        fixed = {"model": job.model, "config": settings.algorithm, "temperature": 1.0}
        experience = jax.jit(functools.partial(make_experience, **fixed))
        for name in REWARDS:
            mine = replaced(job, settings=settings, reward_fn=resolve_reward(name))
            sampled = sampled_with(mine, rollout)
            assert np.ptp(sampled.scored.reward.welfare) > 0, name
            monkeypatch.setattr(align, "sample_groups", lambda job, params, k, s=sampled: (s, {}))
            state = spread(align.start_state(settings, job.model, both, start), job.mesh)
            state, metrics = align.align_step(mine, start, experience, update, state, 1)
            assert float(metrics["update/skipped"].value) == 0.0, name
            moved = [
                np.abs(np.asarray(a) - np.asarray(b)).max()
                for a, b in zip(jax.tree.leaves(state.policy.params), jax.tree.leaves(start), strict=True)
            ]
            assert 0 < max(moved) < 1e-2, name
    assert update._cache_size() == experience._cache_size() == 1


def test_training_goes_on_when_the_judge_is_down(job, rollout):
    """Samples without a verdict leave the batch; with none left the policy stands still, and says so."""
    down = lambda requests: [Verdict(None, "http 503") for _ in requests]
    sampled = sampled_with(replaced(job, judge=down), rollout)
    reward, valid = align.training_reward(job, sampled.scored, rollout.length.shape)
    judged = np.array([chain.reward_ok for chain in sampled.scored.batch.chains]).reshape(valid.shape)
    assert judged.any() and not valid[judged].any() and valid[~judged].all()
    metrics = rollout_metrics(sampled)
    assert metrics["judge/missing"] == pytest.approx(judged.mean())
    assert metrics["reward/welfare"] == 0.0  # what is left are broken chains, which earn nothing
    lines = rollout_lines(job, rollout, sampled.scored, 0)
    for line, unknown in zip(lines, judged.reshape(-1), strict=True):
        assert [line[k] is None for k in ("score", "utility", "user_reward", "answer_reward")] == [
            unknown
        ] * 4


def test_normalising_per_task_changes_the_reward_not_the_record(job, rollout):
    settings = make_settings(parse("--config.align.normalize=zscore"))
    mine = replaced(job, settings=settings)
    sampled = sampled_with(mine, rollout)
    plain, _ = align.training_reward(job, sampled.scored, rollout.length.shape)
    normal, _ = align.training_reward(mine, sampled.scored, rollout.length.shape)
    assert not np.allclose(plain, normal)
    assert rollout_metrics(sampled)["reward/welfare"] == pytest.approx(plain.mean(), abs=1e-6)


def test_refilling_replaces_flat_groups_and_keeps_rows_together(job, rollout):
    first = replaced(sampled_with(job, rollout), flat=np.array([False, True, True, True]))
    backwards = jax.tree.map(lambda x: x[::-1].copy(), rollout)
    second = replaced(first, rollout=backwards, flat=np.array([True, False, False, True]))
    mixed = groups.refill(first, second)
    source = [0, 2, 1, 3]  # group 1 is the second's group 1, which is the first's group 2, and so on
    np.testing.assert_array_equal(mixed.rollout.completion, rollout.completion[source])
    assert mixed.flat.tolist() == [False, False, False, True]
    # The texts of the second were not reversed, so each comes from its own place.
    assert mixed.scored.texts == first.scored.texts
    assert len(mixed.scored.batch.chains) == PROMPTS * GROUP == len(mixed.scored.reward.welfare)


def test_untrained_blocks_earn_no_advantage_but_stay_in_the_loss(job, rollout):
    tokenizer = job.engine.tokenizer
    inside = groups.untrained_tokens(rollout, job.untrained)
    for p, g in np.ndindex(*rollout.length.shape):
        text = tokenizer.decode(rollout.completion[p, g][inside[p, g] & rollout.action_mask[p, g]])
        whole = tokenizer.decode(rollout.completion[p, g, : rollout.length[p, g]])
        assert text == whole.partition("<analyze>")[2].partition("</analyze>")[0] + "</analyze>"
    reward = np.arange(PROMPTS * GROUP, dtype=np.float32).reshape(PROMPTS, GROUP)
    args = (rollout, reward, np.ones_like(reward, bool), None, None, None, job.model)
    seen = make_experience(*args, PRESETS["dr_grpo"], 1.0, untrained=inside)
    np.testing.assert_array_equal(seen.action_mask, rollout.action_mask)
    np.testing.assert_array_equal(np.asarray(seen.advantage) != 0, rollout.action_mask & ~inside)


def test_generating_in_parts_draws_what_the_whole_batch_would(job, start):
    key = jax.random.key(3)
    prompts = engine_lib.prompt_batch(job.engine, job.train.tokens[:PROMPTS])
    whole = groups.generate_in_parts(job, start, prompts, key)
    halves = make_settings(parse(f"--config.align.rollout_prompts={PROMPTS // 2}"))
    parts = groups.generate_in_parts(replaced(job, settings=halves), start, prompts, key)
    np.testing.assert_array_equal(parts.completion, whole.completion)
    np.testing.assert_allclose(parts.sampler_logp, whole.sampler_logp, atol=1e-5)
    with pytest.raises(UserError, match="config.align.rollout_prompts=3: must divide prompts=4"):
        make_settings(parse("--config.align.rollout_prompts=3"))
