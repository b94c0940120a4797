"""Every algorithm with every reward, chosen by name, through a real alignment step; judges may fail."""

import dataclasses

import jax
import numpy as np
import pytest

from gtalign_jax import align
from gtalign_jax import config as config_lib
from gtalign_jax.data import loader
from gtalign_jax.errors import UserError
from gtalign_jax.learning.algorithm import PRESETS
from gtalign_jax.learning.experience import make_experience
from gtalign_jax.learning.learner import experience_program, update_program
from gtalign_jax.learning.spec import Spec
from gtalign_jax.mesh.sharding import spread
from gtalign_jax.rewards.judges.base import Verdict
from gtalign_jax.rewards.mutual_welfare import REWARDS, resolve_reward
from gtalign_jax.run import groups
from gtalign_jax.run.job import load_start, make_job
from gtalign_jax.run.score import rollout_lines, score
from gtalign_jax.run.settings import make_settings
from gtalign_jax.run.states import align_state, make_learner
from gtalign_jax.run.step_metrics import rollout_metrics
from gtalign_jax.types import Batch, Completions, Models, PromptBatch, Rollout

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
        PromptBatch(prompt, np.array([len(ids) for ids in prompts], np.int32)),
        Completions(
            tokens=tokens,
            length=length,
            finished=np.ones_like(length, bool),
            logp=np.where(mask, -6.0, 0.0).astype(np.float32),
            action_mask=mask,
        ),
    )


def items_of(job):
    by_prompt = {tuple(tokens): item for tokens, item in zip(job.train.tokens, job.train.items, strict=True)}
    return [by_prompt[tuple(row.prompt)] for row in job.demonstrations[:PROMPTS]]


def groups_of(job, rollout):
    """Scored, and none of them taken for flat."""
    found = groups.grouped(rollout, score(job, rollout, items_of(job)))
    return replaced(found, flat=np.zeros(PROMPTS, bool))


replaced = dataclasses.replace


@pytest.mark.parametrize("preset", PRESETS)
def test_an_algorithm_takes_every_reward(preset, job, start, rollout, monkeypatch):
    batches = "--config.algorithm.minibatches=2" if PRESETS[preset].minibatches > 1 else "--config.seed=0"
    settings = make_settings(parse(f"--config.align.algorithm={preset}", batches))
    learner = make_learner(settings, job.model, None)
    prompts = groups.StepPrompts(1, rollout.prompts, items_of(job))
    monkeypatch.setattr(align, "step_prompts", lambda job, k: prompts)
    monkeypatch.setattr(align, "generate", lambda *_: rollout)
    with jax.set_mesh(job.mesh):
        before = experience_program._cache_size(), update_program._cache_size()
        for name in REWARDS:
            mine = replaced(job, settings=settings, reward_fn=resolve_reward(name))
            assert np.ptp(groups_of(mine, rollout).scored.reward.welfare) > 0, name
            state = spread(align_state(settings, learner, start), job.mesh)
            state, metrics = align.align_step(mine, learner, start, None, state, 1)
            assert float(metrics["update/skipped"].value) == 0.0, name
            moved = [
                np.abs(np.asarray(a) - np.asarray(b)).max()
                for a, b in zip(jax.tree.leaves(state.policy.params), jax.tree.leaves(start), strict=True)
            ]
            assert 0 < max(moved) < 1e-2, name
    after = experience_program._cache_size(), update_program._cache_size()
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]


def test_training_goes_on_when_the_judge_is_down(job, rollout):
    """Samples without a verdict leave the batch; with none left the policy stands still, and says so."""
    down = lambda requests: [Verdict(None, "http 503") for _ in requests]
    found = groups_of(replaced(job, judge=down), rollout)
    valid = groups.training_batch(job, found).valid
    judged = np.array([chain.reward_ok for chain in found.scored.batch.chains]).reshape(valid.shape)
    assert judged.any() and not valid[judged].any() and valid[~judged].all()
    metrics = rollout_metrics(rollout, found.scored)
    assert metrics["judge/missing"] == pytest.approx(judged.mean())
    assert metrics["reward/welfare"] == 0.0  # what is left are broken chains, which earn nothing
    lines = rollout_lines(rollout, found.scored, 0)
    for line, unknown in zip(lines, judged.reshape(-1), strict=True):
        assert [line[k] is None for k in ("score", "utility", "user_reward", "answer_reward")] == [
            unknown
        ] * 4


def test_normalising_per_task_changes_the_reward_not_the_record(job, rollout):
    settings = make_settings(parse("--config.align.normalize=zscore"))
    mine = replaced(job, settings=settings)
    found = groups_of(mine, rollout)
    plain, normal = (groups.training_batch(of, found).reward for of in (job, mine))
    assert not np.allclose(plain, normal)
    assert rollout_metrics(rollout, found.scored)["reward/welfare"] == pytest.approx(plain.mean(), abs=1e-6)


def test_refilling_replaces_flat_groups_and_keeps_rows_together(job, rollout):
    first = replaced(groups_of(job, rollout), flat=np.array([False, True, True, True]))
    backwards = jax.tree.map(lambda x: x[::-1].copy(), rollout)
    second = replaced(first, rollout=backwards, flat=np.array([True, False, False, True]))
    mixed = groups.replace_flat(first, second)
    source = [0, 2, 1, 3]  # group 1 is the second's group 1, which is the first's group 2, and so on
    np.testing.assert_array_equal(mixed.rollout.completions.tokens, rollout.completions.tokens[source])
    assert mixed.flat.tolist() == [False, False, False, True]
    # The texts of the second were not reversed, so each comes from its own place.
    assert mixed.scored.texts == first.scored.texts
    assert len(mixed.scored.batch.chains) == PROMPTS * GROUP == len(mixed.scored.reward.welfare)


def test_untrained_blocks_earn_no_advantage_but_stay_in_the_loss(job, rollout):
    tokenizer, written = job.engine.tokenizer, rollout.completions
    inside = groups.inside_blocks(written, job.untrained)
    for p, g in np.ndindex(*written.length.shape):
        text = tokenizer.decode(written.tokens[p, g][inside[p, g] & written.action_mask[p, g]])
        whole = tokenizer.decode(written.tokens[p, g, : written.length[p, g]])
        assert text == whole.partition("<analyze>")[2].partition("</analyze>")[0] + "</analyze>"
    reward = np.arange(PROMPTS * GROUP, dtype=np.float32).reshape(PROMPTS, GROUP)
    batch = Batch(rollout, reward, np.ones_like(reward, bool), untrained=inside)
    seen = make_experience(Spec(job.model, PRESETS["dr_grpo"]), Models(None), batch)
    np.testing.assert_array_equal(seen.completions.action_mask, written.action_mask)
    np.testing.assert_array_equal(np.asarray(seen.advantage) != 0, written.action_mask & ~inside)


def test_generating_in_parts_draws_what_the_whole_batch_would(job, start):
    prompts = groups.step_prompts(job, 3)
    whole = groups.generate(job, start, prompts).completions
    halves = make_settings(parse(f"--config.align.rollout_prompts={PROMPTS // 2}"))
    parts = groups.generate(replaced(job, settings=halves), start, prompts).completions
    np.testing.assert_array_equal(parts.tokens, whole.tokens)
    np.testing.assert_allclose(parts.logp, whole.logp, atol=1e-5)
    with pytest.raises(UserError, match="config.align.rollout_prompts=3: must divide prompts=4"):
        make_settings(parse("--config.align.rollout_prompts=3"))
