"""Who generates in a run: rollouts ahead of their judging, samples that were lost, weights handed over."""

import dataclasses
import threading
import types

import jax
import numpy as np
import pytest

from gtalign_jax import align
from gtalign_jax import config as config_lib
from gtalign_jax.data import loader
from gtalign_jax.errors import UserError
from gtalign_jax.learning.state import init_state
from gtalign_jax.mesh import processes
from gtalign_jax.mesh.sharding import spread
from gtalign_jax.rollout import generator as generator_lib
from gtalign_jax.rollout.grammar import UNLIMITED
from gtalign_jax.rollout.servers import EMBEDDED
from gtalign_jax.run import checkpoint, groups
from gtalign_jax.run.job import make_job
from gtalign_jax.run.layout import restored, stored
from gtalign_jax.run.score import judge_share, rollout_lines, score
from gtalign_jax.run.settings import make_settings
from gtalign_jax.run.states import no_completions
from gtalign_jax.run.step_metrics import rollout_metrics
from gtalign_jax.types import Completions, ModelState, Rollout

PROMPTS, GROUP = 4, 2
FLAGS = [
    "--config=configs/quickstart.py:tiny",
    f"--config.align.prompts={PROMPTS}",
    f"--config.align.group_size={GROUP}",
    f"--config.sft.chains={GROUP}",
    "--config.align.overlap=True",
    "--config.model.num_layers=1",
    "--workdir=x",
]


def parse(*flags):
    return config_lib.parse_command(["prog", *FLAGS, *flags], {"workdir": ""})[0]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(parse(), tmp_path_factory.mktemp("job"))


class Teacher:
    """Writes the teacher's chains of each prompt; the logprobs name the parameters it was called with."""

    def __init__(self, job):
        self.chains = {tuple(row.prompt): row.completions for row in job.demonstrations}
        self.slots, self.calls, self.writing = job.settings.max_new_tokens, [], threading.Event()

    def __call__(self, engine, params, request):
        self.calls.append(params)
        if len(self.calls) > 1:
            self.writing.set()
        prompts = request.prompts
        asked = [tuple(row[:n].tolist()) for row, n in zip(prompts.tokens, prompts.length, strict=True)]
        tokens, length = loader.pad_completions([self.chains[ids] for ids in asked], self.slots)
        mask = np.arange(self.slots) < length[..., None]
        done, logp = np.ones_like(length, bool), np.where(mask, -float(params), 0).astype(np.float32)
        return Rollout(prompts, Completions(tokens, length, done, logp, mask))


class Pupil:
    """A learner that keeps what it is shown and leaves the state as it is."""

    def __init__(self):
        self.shown = []

    def schedule(self, rng, rollout, shards):
        return None

    def experience(self, models, batch, kl_coef, schedule):
        self.shown.append(jax.device_get(batch))

    def update(self, state, experience, base, schedule):
        assert state.waiting is None, "what waits is no part of an update"
        return state, {}


def stepped(job, pupil, state, k, params):
    """The state after step k of alignment with these parameters."""
    state = state.replace(policy=state.policy.replace(params=params))
    with jax.set_mesh(job.mesh):
        return align.align_step(job, pupil, None, None, state, k)[0]


@pytest.fixture
def taught(job):
    teacher = Teacher(job)
    generator = dataclasses.replace(job.generator, rollout=teacher)
    return dataclasses.replace(job, generator=generator), teacher


def first_state(job):
    """A state at step 0 that trains nothing; completions wait in it."""
    policy = ModelState(params=None, opt_state=None)
    return init_state(jax.random.key(0), policy, waiting=no_completions(job.settings))


def test_step_k_is_judged_while_the_policy_before_its_update_writes_step_k_plus_1(taught):
    job, teacher = taught

    def judge(requests):
        assert teacher.writing.wait(60), "the next step is not being written"
        return judge_by_rules(requests)

    judge_by_rules = job.judge
    settings = dataclasses.replace(job.settings, align=dataclasses.replace(job.settings.align, steps=3))
    job = dataclasses.replace(job, judge=judge, settings=settings)
    state, pupil, seen = first_state(job), Pupil(), []
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(state.waiting)]
    for k in range(3):
        if k == 1:
            teacher.writing.clear()
        if k == 2:  # at the last step nothing is written
            teacher.writing.set()
        state = stepped(job, pupil, state, k, 10.0 + k)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(state.waiting)] == shapes
        batch = pupil.shown[-1]
        seen.append(-batch.rollout.completions.logp[0, 0, 0])
        # Prompts, completions and rewards of a step belong together.
        prompts = groups.step_prompts(job, k)
        plain = dataclasses.replace(job, judge=judge_by_rules)
        rollout = groups.generate(plain, 0.0, prompts)
        np.testing.assert_array_equal(batch.rollout.completions.tokens, rollout.completions.tokens)
        want = score(plain, rollout, prompts.items)
        np.testing.assert_array_equal(batch.reward.reshape(-1), want.reward.welfare)
    assert seen == [10.0, 10.0, 11.0]
    assert [p for p in teacher.calls if p] == [10.0, 10.0, 11.0]


def test_what_waits_is_in_the_checkpoint(taught, tmp_path):
    job, _ = taught
    state = spread(stepped(job, Pupil(), first_state(job), 0, 1.0).replace(policy=None), job.mesh)
    manager = checkpoint.open_manager(tmp_path / "align", keep=1)
    checkpoint.save(manager, 1, stored(state), {})
    manager.wait_until_finished()
    like = spread(first_state(job).replace(policy=None), job.mesh)
    step, found = checkpoint.restore_latest(manager, stored(like))
    manager.close()
    found, pupil = restored(found), Pupil()
    jax.tree.map(np.testing.assert_array_equal, found.waiting, state.waiting)
    stepped(job, pupil, found.replace(policy=ModelState(None, None)), step, 2.0)
    written = pupil.shown[0].rollout.completions
    assert (written.logp[written.action_mask] == -1.0).all()
    assert (written.tokens == np.asarray(state.waiting.tokens)).all()


def test_overlap_and_refills_exclude_each_other():
    with pytest.raises(UserError, match="config.align.overlap: dynamic_sampling refills"):
        make_settings(parse("--config.align.algorithm=dapo"))


# --- samples that did not come back ----------------------------------------------------------------


def test_a_sample_that_did_not_come_back_is_in_no_mean(taught):
    job, _ = taught
    prompts = groups.step_prompts(job, 0)
    rollout, items = groups.generate(job, 1.0, prompts), prompts.items
    written = rollout.completions
    lost = np.zeros((PROMPTS, GROUP), bool)
    lost[1, 0] = True
    cut = rollout.replace(
        completions=written.replace(
            length=np.where(lost, 0, written.length),
            finished=written.finished & ~lost,
            action_mask=written.action_mask & ~lost[..., None],
        )
    )
    scored = score(job, cut, items)
    assert (scored.batch.features.valid == ~lost.reshape(-1)).all()
    metrics = rollout_metrics(cut, scored)
    whole = score(job, rollout, items)
    kept = whole.reward.welfare[~lost.reshape(-1)]
    assert metrics["reward/welfare"] == pytest.approx(kept.mean(), abs=1e-6)
    assert metrics["judge/missing"] == pytest.approx(lost.mean())
    before = rollout_metrics(rollout, whole)
    for name in ("reward/format", "length/truncated"):  # the teacher's chains are all alike in these
        assert metrics[name] == before[name]
    assert metrics["length/mean"] == pytest.approx(written.length[~lost].mean())
    outputs = [line["output"] for line in rollout_lines(cut, scored, 0)]
    assert outputs == [t for t, gone in zip(whole.texts, lost.reshape(-1), strict=True) if not gone]


def test_a_judge_that_refuses_one_host_stops_all(job, monkeypatch):
    prompts = groups.step_prompts(job, 0)
    rollout = Teacher(job)(None, 1.0, types.SimpleNamespace(prompts=prompts.batch))
    refusal = UserError("config.judge: all 9 requests were refused (http 401)")

    def refuse(requests):
        raise refusal

    refused = dataclasses.replace(job, judge=refuse)
    for mine, theirs in ((job, refused), (refused, job)):
        other = judge_share(theirs, rollout, prompts.items)
        monkeypatch.setattr(processes, "all_gather", lambda share, other=other: [share, other])
        with pytest.raises(UserError, match="all 9 requests were refused"):
            score(mine, rollout, prompts.items)


# --- the switch --------------------------------------------------------------------------------------


def test_one_switch_holds_sampler_and_trainer_to_the_grammar(job, tmp_path):
    config = dataclasses.replace(job.settings.engine, grammar=True)
    generator = generator_lib.make_generator(config, job.engine, tmp_path)
    limit = generator_lib.trainer_limit(generator, job.settings.sampling, 77)
    assert generator.server is None and int(limit.states.args[0].budget) == 77
    assert (
        generator_lib.trainer_limit(job.generator, job.settings.sampling, 77) is None
        and job.generator.constraint is None
    )
    with pytest.raises(ValueError, match="^grammar: needs kind='embedded'"):
        dataclasses.replace(config, kind="vllm")


def test_limits_of_blocks_come_from_the_config(job, tmp_path):
    flags = ["--config.engine.grammar=True", "--config.engine.limits.thinking=7"]
    command = ["prog", "--config=configs/quickstart.py:tiny", *flags, "--workdir=x"]
    settings = make_settings(config_lib.parse_command(command, {"workdir": ""})[0])
    generator = generator_lib.make_generator(settings.engine, job.engine, tmp_path)
    assert np.asarray(generator.constraint.limit).tolist() == [7, *[UNLIMITED] * 4]
    limit = generator_lib.trainer_limit(generator, job.settings.sampling, 77)
    assert limit.states.args[0].limit[0] == 7
    with pytest.raises(ValueError, match="^limits: only the grammar knows blocks"):
        dataclasses.replace(settings.engine, grammar=False)


def test_weights_go_to_servers_when_due_and_once_after_a_start(job, monkeypatch):
    pushed, counts = [], {}

    def push(server, params, engine, folder):
        pushed.append((params, folder.name))
        counts["pushes"] = len(pushed)

    monkeypatch.setattr(generator_lib.external, "push_weights", push)
    server = types.SimpleNamespace(pool=types.SimpleNamespace(numbers=lambda: counts))
    served = dataclasses.replace(job.generator, server=server)
    for k in range(3, 8):
        generator_lib.hand_over(served, job.engine, k, due=k % 4 == 0)
    assert pushed == [(3, "engine"), (4, "engine")]
    assert job.settings.engine.kind == EMBEDDED
    generator_lib.hand_over(job.generator, job.engine, 9)
    assert len(pushed) == 2
