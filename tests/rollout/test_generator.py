"""Who generates in a run: rollouts ahead of their judging, samples that were lost, weights handed over."""

import dataclasses
import threading
import types

import jax
import numpy as np
import pytest

from gtalign_jax import config as config_lib
from gtalign_jax.align import optimizers, start_state
from gtalign_jax.data import loader
from gtalign_jax.errors import UserError
from gtalign_jax.mesh.sharding import spread
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generator as generator_lib
from gtalign_jax.rollout.grammar import UNLIMITED
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.servers import EMBEDDED
from gtalign_jax.run import checkpoint, groups
from gtalign_jax.run.job import load_start, make_job
from gtalign_jax.run.score import rollout_lines, score
from gtalign_jax.run.settings import make_settings
from gtalign_jax.run.step_metrics import rollout_metrics
from gtalign_jax.types import Completions, Rollout

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
        prompts = request.prompts
        self.calls.append(params)
        if len(self.calls) > 1:
            self.writing.set()
        asked = [tuple(row[:n].tolist()) for row, n in zip(prompts.tokens, prompts.length, strict=True)]
        tokens, length = loader.pad_completions([self.chains[ids] for ids in asked], self.slots)
        mask = np.arange(self.slots) < length[..., None]
        done, logp = np.ones_like(length, bool), np.where(mask, -float(params), 0).astype(np.float32)
        return Rollout(prompts, Completions(tokens, length, done, logp, mask))


@pytest.fixture
def taught(job):
    teacher = Teacher(job)
    generator = dataclasses.replace(job.generator, rollout=teacher)
    return dataclasses.replace(job, generator=generator), teacher


def shapes_of(completions):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(completions)]


def test_step_k_is_judged_while_the_policy_before_its_update_writes_step_k_plus_1(taught):
    job, teacher = taught

    def judge(requests):
        assert teacher.writing.wait(60), "the next step is not being written"
        return judge_by_rules(requests)

    judge_by_rules = job.judge
    job = dataclasses.replace(job, judge=judge)
    waiting, seen = groups.no_completions(job.settings), []
    shapes = shapes_of(waiting)
    for k in range(3):
        if k == 1:  # at the last step nothing is written
            teacher.writing.clear()
        sampled, _, waiting = groups.sample_ahead(job, 10.0 + k, k, waiting, last=k == 2)
        assert shapes_of(waiting) == shapes
        seen.append(-sampled.rollout.completions.logp[0, 0, 0])
        # Prompts, completions and items of a step belong together.
        want = score(dataclasses.replace(job, judge=judge_by_rules), *groups.write(job, 0.0, k))
        np.testing.assert_array_equal(sampled.scored.reward.welfare, want.reward.welfare)
        assert sampled.scored.texts == want.texts and sampled.scored.items == want.items
    assert seen == [10.0, 10.0, 11.0]
    assert [p for p in teacher.calls if p] == [10.0, 10.0, 11.0]


def test_what_waits_is_in_the_checkpoint(taught, tmp_path):
    job, _ = taught

    def fresh():
        return start_state(job.settings, job.model, optimizers(job.settings), load_start(job))

    state = fresh()
    _, _, waiting = groups.sample_ahead(job, 1.0, 0, state.waiting, last=False)
    state = spread(state.replace(waiting=spread(waiting, job.mesh)), job.mesh)
    manager = checkpoint.open_manager(tmp_path / "align", keep=1)
    checkpoint.save(manager, 1, state, {})
    manager.wait_until_finished()
    like = spread(fresh(), job.mesh)
    step, found = checkpoint.restore_latest(manager, like)
    manager.close()
    jax.tree.map(np.testing.assert_array_equal, found.waiting, waiting)
    again, _, _ = groups.sample_ahead(job, 2.0, step, found.waiting, last=True)
    made = again.rollout.completions
    assert (made.logp[made.action_mask] == -1.0).all()
    assert (made.tokens == waiting.tokens).all()


def test_overlap_and_refills_exclude_each_other():
    with pytest.raises(UserError, match="config.align.overlap: dynamic_sampling refills"):
        make_settings(parse("--config.align.algorithm=dapo"))


# --- samples that did not come back ----------------------------------------------------------------


def test_a_sample_that_did_not_come_back_is_in_no_mean(taught):
    job, _ = taught
    rollout, items = groups.write(job, 1.0, 0)
    lost = np.zeros((PROMPTS, GROUP), bool)
    lost[1, 0] = True
    made = rollout.completions
    fewer = made.replace(
        length=np.where(lost, 0, made.length),
        finished=made.finished & ~lost,
        action_mask=made.action_mask & ~lost[..., None],
    )
    cut = rollout.replace(completions=fewer)
    scored = score(job, cut, items)
    assert (scored.batch.features.valid == ~lost.reshape(-1)).all()
    untrained = np.zeros(made.tokens.shape, bool)
    metrics = rollout_metrics(groups.Sampled(cut, scored, np.zeros(PROMPTS, bool), untrained))
    whole = score(job, rollout, items)
    kept = whole.reward.welfare[~lost.reshape(-1)]
    assert metrics["reward/welfare"] == pytest.approx(kept.mean(), abs=1e-6)
    assert metrics["judge/missing"] == pytest.approx(lost.mean())
    before = rollout_metrics(groups.Sampled(rollout, whole, np.zeros(PROMPTS, bool), untrained))
    for name in ("reward/format", "length/truncated"):  # the teacher's chains are all alike in these
        assert metrics[name] == before[name]
    assert metrics["length/mean"] == pytest.approx(made.length[~lost].mean())
    outputs = [line["output"] for line in rollout_lines(job, cut, scored, 0)]
    assert outputs == [t for t, gone in zip(whole.texts, lost.reshape(-1), strict=True) if not gone]


# --- the switch --------------------------------------------------------------------------------------


def test_one_switch_holds_sampler_and_trainer_to_the_grammar(job, tmp_path):
    config = dataclasses.replace(job.settings.engine, grammar=True)
    generator = generator_lib.make_generator(config, job.engine, tmp_path)
    limit = generator_lib.trainer_limit(generator, 77)
    assert generator.server is None and int(limit.states.args[0].budget) == 77
    assert generator_lib.trainer_limit(job.generator, 77) is None and job.generator.constraint is None
    with pytest.raises(UserError, match="config.engine.grammar: needs kind='embedded'"):
        dataclasses.replace(config, kind="vllm")


def test_a_run_adds_its_grammar_to_what_is_asked(job):
    prompts = engine_lib.prompt_batch(job.engine, job.train.tokens[:PROMPTS])
    request = Request(prompts, jax.random.key(0), GROUP, 5, first_row=3)
    held = dataclasses.replace(job.generator, rollout=lambda *args: args, constraint="tables")
    engine, params, seen = generator_lib.generate(held, job.engine, "params", request)
    assert engine is job.engine and params == "params"
    assert seen.constraint == "tables" and seen.prompts is prompts and seen.key is request.key
    assert (seen.group_size, seen.max_new_tokens, seen.first_row) == (GROUP, 5, 3)


def test_limits_of_blocks_come_from_the_config(job, tmp_path):
    flags = ["--config.engine.grammar=True", "--config.engine.limits.thinking=7"]
    command = ["prog", "--config=configs/quickstart.py:tiny", *flags, "--workdir=x"]
    settings = make_settings(config_lib.parse_command(command, {"workdir": ""})[0])
    generator = generator_lib.make_generator(settings.engine, job.engine, tmp_path)
    assert np.asarray(generator.constraint.limit).tolist() == [7, *[UNLIMITED] * 4]
    limit = generator_lib.trainer_limit(generator, 77)
    assert limit.states.args[0].limit[0] == 7
    with pytest.raises(UserError, match="config.engine.limits: only the grammar knows blocks"):
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
