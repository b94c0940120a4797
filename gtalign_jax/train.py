"""The whole path: SFT cold start, alignment on mutual welfare, evaluation, steering, report, export.

One alignment step reads top to bottom in `align_step`:

    batch      = the prompts of step k                     a function of (seed, k)
    rollout    = generate(policy, batch)                   tokens, sampler logprobs
    scored     = score(rollout)                            text → features → welfare
    experience = make_experience(rollout, welfare, ...)    advantages, reference logprobs
    state      = update(state, experience)                 donated

Every phase resumes from its newest checkpoint; data order and random keys are functions of the step, so
a run that was killed ends with the bytes of one that was not.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gtalign_jax import checkpoint, health
from gtalign_jax.bootstrap import format_table, summary_table
from gtalign_jax.data import loader
from gtalign_jax.errors import UserError
from gtalign_jax.evaluate import Scored, evaluate, rollout_lines, score
from gtalign_jax.game.pricing import apply_policy
from gtalign_jax.job import Job, make_job, save_model, write_config
from gtalign_jax.metrics import RunLog
from gtalign_jax.models import hf
from gtalign_jax.models.heads import init_value_model
from gtalign_jax.report import write_report
from gtalign_jax.reporting import jsonl
from gtalign_jax.reporting.progress import Progress
from gtalign_jax.reporting.rollouts import write_rollouts
from gtalign_jax.rl.advantages import informative_groups
from gtalign_jax.rl.experience import make_experience
from gtalign_jax.rl.update import make_update
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.sft.update import SftBatch, completion_mask, make_sft_update
from gtalign_jax.state import init_state, make_optimizer
from gtalign_jax.steering import steer as steering
from gtalign_jax.types import PyTree, Ratio, Rollout, TrainState

PHASES = ("sft", "align")
Metrics = dict[str, Any]
Step = Callable[[TrainState, int], tuple[TrainState, Metrics]]


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Run, or go on with, the job of a config in its work directory."""
    job = make_job(config, workdir)
    write_config(config, workdir)
    stop = _stop_on_sigterm()
    with RunLog(workdir, PHASES, job.settings.metrics, settings=config.to_dict()) as run_log:
        start = hf.load_params(job.model_folder, job.model)
        sft = run_sft(job, start, run_log, stop)
        rows = {"sft": evaluate_once(job, "sft", sft, job.settings.sft.steps)}
        aligned = run_align(job, sft, run_log, stop)
        if job.settings.align.steps:
            rows["aligned"] = evaluate_once(job, "aligned", aligned, job.settings.align.steps)
    summary = summary_table(rows)
    jsonl.write_atomic(workdir / "summary.json", json.dumps(summary, indent=1) + "\n")
    save_model(aligned, job.model, workdir / "hf", job.engine.tokenizer)
    jsonl.write(workdir / "steering.jsonl", steer_examples(job, aligned))
    report = write_report(workdir)
    print(format_table(summary))
    print(f"report  {report}\nmodel   {workdir / 'hf'}")


# --- phases -------------------------------------------------------------------------------------


def run_sft(job: Job, start: PyTree, run_log: RunLog, stop: Callable[[], bool]) -> PyTree:
    """The parameters after the cold start."""
    steps = job.settings.sft.steps
    if not steps:
        return start
    optimizer = make_optimizer(job.settings.sft_optimizer, steps)
    state = init_state(jax.random.key(job.settings.seed), start, optimizer)
    update = make_sft_update(job.model, optimizer, job.settings.sft.microbatches)

    def step(state: TrainState, k: int) -> tuple[TrainState, Metrics]:
        batch = sft_batch(job, k)
        state, metrics = update(state, batch)
        return state, metrics | {"tokens": int(batch.mask.sum())}

    return run_phase(job, "sft", state, steps, step, run_log, stop).policy.params


def sft_batch(job: Job, k: int) -> SftBatch:
    """The demonstrations of step k."""
    data, seed = job.demonstrations, job.settings.data.seed
    rows = [data[i] for i in loader.step_rows(len(data), job.settings.sft.prompts, seed, k)]
    prompts = engine_lib.prompt_batch(job.engine, [row.prompt for row in rows])
    tokens, length = loader.pad_completions([row.completions for row in rows], job.settings.max_new_tokens)
    return SftBatch(prompts.tokens, prompts.length, tokens, np.asarray(completion_mask(tokens, length)))


def run_align(job: Job, reference: PyTree, run_log: RunLog, stop: Callable[[], bool]) -> PyTree:
    """The parameters after alignment; the reference is the policy it starts from, never changed."""
    settings = job.settings
    if not settings.align.steps:
        return reference
    updates = settings.align.steps * settings.algorithm.epochs * settings.algorithm.minibatches
    optimizer = make_optimizer(settings.policy_optimizer, updates)
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # the state is donated, the reference must live on
    critic, critic_optimizer = None, None
    if settings.algorithm.advantage == "gae":
        critic_optimizer = make_optimizer(settings.critic_optimizer, updates)
        critic = (init_value_model(copy(reference), job.model), critic_optimizer)
    state = init_state(jax.random.key(settings.seed + 1), copy(reference), optimizer, critic)
    temperature = settings.sampling.temperature
    update = make_update(job.model, settings.algorithm, optimizer, critic_optimizer, temperature)
    experience = jax.jit(
        functools.partial(
            make_experience, model=job.model, config=settings.algorithm, temperature=temperature
        )
    )
    step = functools.partial(align_step, job, reference, experience, update)
    return run_phase(job, "align", state, settings.align.steps, step, run_log, stop).policy.params


def align_step(
    job: Job, reference: PyTree, experience: Callable, update: Callable, state: TrainState, k: int
) -> tuple[TrainState, Metrics]:
    """One rollout and the update it leads to."""
    settings = job.settings.align
    rows = loader.step_rows(len(job.train.items), settings.prompts, job.settings.data.seed, k)
    items = [job.train.items[i] for i in rows]
    prompts = engine_lib.prompt_batch(job.engine, [job.train.tokens[i] for i in rows], rows)
    key = jax.random.fold_in(jax.random.key(job.settings.seed + 2), k)
    params = state.policy.params
    rollout = engine_lib.rollout(
        job.engine, params, prompts, key, settings.group_size, job.settings.max_new_tokens
    )
    scored = score(job, rollout, items)
    shape = rollout.length.shape
    reward = scored.reward.welfare.reshape(shape)
    valid = scored.batch.features.valid.reshape(shape)
    critic = None if state.critic is None else state.critic.params
    seen = experience(rollout, reward, valid, params, reference, critic)
    state, metrics = update(state, seen)
    if k % settings.dump_every == 0 or k + 1 == settings.steps:
        write_rollouts(job.workdir, "train", k, rollout_lines(job, rollout, scored, k))
    return state, metrics | rollout_metrics(rollout, scored, reward, valid)


def rollout_metrics(rollout: Rollout, scored: Scored, reward: np.ndarray, valid: np.ndarray) -> Metrics:
    """What the completions of a step were like."""
    f, action = scored.batch.features, scored.batch.action
    length = np.asarray(rollout.length)
    metrics = {
        "reward/welfare": reward.mean(),
        "reward/user": scored.reward.user.mean(),
        "reward/llm": scored.reward.llm.mean(),
        "reward/format": (f.format_ok & f.payoff_ok).mean(),
        "reward/answer": scored.batch.answer.mean(),
        "reward/frontier": f.frontier.mean(),
        "length/mean": length.mean(),
        "length/truncated": 1.0 - np.asarray(rollout.finished).mean(),
        "judge/missing": 1.0 - valid.mean(),
        "group/zero_variance": 1.0 - np.asarray(informative_groups(reward, valid)).mean(),
        "tokens": int(length.sum()),
    }
    metrics |= {f"action/{name}": float(np.mean([a == name for a in action])) for name in ("DA", "CQ", "AQ")}
    for task in sorted({item.task for item in scored.items}):
        mine = np.array([item.task == task for item in scored.items])
        metrics[f"reward/welfare/{task}"] = scored.reward.welfare[mine].mean()
    return metrics


def run_phase(
    job: Job,
    name: str,
    state: TrainState,
    steps: int,
    step: Step,
    run_log: RunLog,
    stop: Callable[[], bool],
) -> TrainState:
    """Steps 0..steps-1 of a phase, from its newest checkpoint on; metrics are read one step late."""
    config = job.settings.checkpoint
    manager = checkpoint.open_manager(job.workdir / "checkpoints" / name, keep=config.keep)
    restored = checkpoint.restore_latest(manager, state)
    first, state = restored or (0, state)
    if first >= steps:
        return state
    checkpoint.drop_after(manager, first)
    run_log.begin(name, first)
    history: list[Metrics] = []
    with Progress(name, steps, first) as progress:
        late, began = None, time.monotonic()
        for k in range(first, steps):
            state, metrics = step(state, k)
            if late is not None:
                _record(job, name, *late, run_log, progress, history)
            late, began = (k, metrics, time.monotonic() - began), time.monotonic()
            done = k + 1
            if done % config.every == 0 or done == steps or stop():
                checkpoint.save(manager, done, state, {"phase": name, "step": done})
            if stop() and done < steps:
                manager.wait_until_finished()
                progress.say(f"stopped by a signal after step {k} of {name}; run the same command to go on")
                sys.exit(0)
        _record(job, name, *late, run_log, progress, history)
    manager.wait_until_finished()
    manager.close()
    return state


def _record(
    job: Job,
    phase: str,
    k: int,
    metrics: Metrics,
    seconds: float,
    run_log: RunLog,
    progress: Progress,
    history: list[Metrics],
) -> None:
    """Fetch, log and check the metrics of a step; a health rule may end the run."""
    values = {
        key: float(value.value if isinstance(value, Ratio) else value)
        for key, value in jax.device_get(metrics).items()
    }
    values["tokens_per_s"] = values.pop("tokens") / seconds
    if "value/return_square" in values:
        spread = values.pop("value/return_square") - values["value/return"] ** 2
        values["value/explained_variance"] = 1.0 - values["value/error"] / max(spread, 1e-8)
    run_log.write(phase, k, values)
    progress.update(k + 1, values)
    history.append({"phase": phase, "step": k, **values})
    for finding in health.check(history, job.settings.health):
        progress.say(str(finding))
        if finding.stop:
            raise UserError(f"{finding}; metrics are in {job.workdir / 'metrics.jsonl'}")


def _stop_on_sigterm() -> Callable[[], bool]:
    """Ask for a clean stop on SIGTERM, which schedulers send before they take a machine away."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    return lambda: bool(asked)


# --- after training -----------------------------------------------------------------------------


def evaluate_once(job: Job, name: str, params: PyTree, step: int) -> list[dict[str, Any]]:
    """The rollout lines of a model's evaluation, from its file when a run before this one made it."""
    path = job.workdir / "rollouts" / f"{name}_{step}.jsonl"
    if not path.is_file():
        write_rollouts(job.workdir, name, step, evaluate(job, params, step))
    return jsonl.read(path)


def steer_examples(job: Job, params: PyTree) -> list[dict[str, Any]]:
    """One steered example a task: the first test prompt whose action changes, else the first that works."""
    config = job.settings.steer
    engine = dataclasses.replace(job.engine, sampling=steering_sampling())
    stop = steering.stop_ending(engine)
    edit = lambda payoff: np.asarray(apply_policy(payoff, config.policy, config.price)).round(1)
    examples = []
    for task in dict.fromkeys(item.task for item in job.test.items):
        chosen = None
        for item in [item for item in job.test.items if item.task == task][: config.tries]:
            try:
                steered = steering.steer(
                    engine,
                    params,
                    item.messages,
                    edit,
                    jax.random.key(0),
                    max_new_tokens=job.settings.max_new_tokens,
                    stop=stop,
                )
            except UserError:
                continue  # this chain has no usable matrix to edit; another prompt's may
            if chosen is None or steered.edited.action != steered.original.action:
                chosen = (item, steered)
            if steered.edited.action != steered.original.action:
                break
        if chosen is not None:
            examples.append(_steering_line(*chosen, config.policy, config.price))
    return examples


def steering_sampling():
    """Greedy: the two branches then differ by the edit alone."""
    return engine_lib.SamplingConfig(temperature=0.0)


def _steering_line(item, steered: steering.Steered, policy: str, price: float) -> dict[str, Any]:
    side = lambda b: {"payoff": b.payoff.tolist(), "action": b.action, "text": b.text}
    return {
        "task": item.task,
        "prompt": item.messages[-1]["content"],
        "policy": policy,
        "price": price,
        "before": side(steered.original),
        "after": side(steered.edited),
    }
