"""The cases of `bench_train` whose completions differ in length: what leaving out their padding is worth.

Lengths are log-normal with a median of 0.3 N and sigma 0.5, cut at N, so that a mean completion fills a third
of its slots. ours and the peer (our own padded update) train on the same tokens from the same weights; rates
count real tokens, every prompt once for its group (`ragged`) or once a chain (`pack`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping

import jax
import numpy as np

from experiments import bench_common as common
from experiments.bench_common import Contender, Line, Workload
from gtalign_jax.data.loader import Demonstration
from gtalign_jax.data.packing import PackedStream
from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.learning.by_tokens import schedule_of
from gtalign_jax.learning.learner import Learner
from gtalign_jax.learning.microbatches import Schedule
from gtalign_jax.learning.sft import PackedBatch, SftBatch, SftSetup, sft_update
from gtalign_jax.learning.spec import Spec
from gtalign_jax.learning.state import Optimizer, OptimizerConfig, init_model, init_state, make_optimizer
from gtalign_jax.learning.update import Optimizers
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, spread
from gtalign_jax.types import Completions, Experience, PromptBatch, PyTree

MEDIAN, SIGMA = 0.3, 0.5
OPTIMIZER = OptimizerConfig(lr=1e-5)


def lengths(shape: tuple[int, ...], slots: int) -> np.ndarray:
    """int32 log-normal lengths in [1, slots]."""
    drawn = np.random.default_rng(3).lognormal(np.log(MEDIAN * slots), SIGMA, shape)
    return np.clip(drawn.astype(np.int32), 1, slots)


def timed(
    update: Callable, params: PyTree, optimizer: Optimizer, batch: PyTree, loss: str, firsts: list[float]
) -> Contender:
    """One update a call; the loss of the first is added to firsts."""
    mesh = make_mesh(MeshConfig())
    state = init_state(jax.random.key(0), init_model(params, optimizer))
    placed, held = spread(jax.device_put(batch), mesh), {"state": spread(state, mesh)}
    calls = itertools.count()

    def run() -> None:
        held["state"], metrics = update(held["state"], placed)
        jax.block_until_ready(held["state"])
        if next(calls) == 0:
            firsts.append(float(metrics[loss].value))

    return run


def compared(
    flags: argparse.Namespace, makes: Mapping[str, common.Make], firsts: list[float], tokens: int, line: Line
) -> list[Line]:
    """The line of two contenders; RuntimeError when they did not begin with the same loss."""
    seconds = common.time_rounds(flags.repeats, makes, together=flags.device == "cpu")
    first, second = firsts
    if abs(first - second) > {"float32": 1e-4, "bfloat16": 5e-2}[flags.dtype] * max(1.0, abs(first)):
        raise RuntimeError(f"the first losses differ: {firsts}")
    line |= common.compare(seconds["ours"], seconds["peer"], tokens)
    return [line | {"tokens": tokens}]


# --- alignment ------------------------------------------------------------------------------------------


def ragged(flags: argparse.Namespace) -> list[Line]:
    """The policy's update by token count, and in padded micro-batches of as many slots: two prompts each."""
    size = common.workload("W", flags.shape)
    size = dataclasses.replace(size, prompts=2 * size.prompts)
    seen = ragged_batch(size, common.SHAPES[flags.shape]["vocab_size"])
    budget = 2 * (size.slots + size.group * size.new)
    padded = AlgorithmConfig(microbatches=size.prompts // 2)
    by_count = AlgorithmConfig(microbatch_tokens=budget)
    firsts: list[float] = []

    def make(config: AlgorithmConfig, schedule: Schedule | None) -> Contender:
        model, params = common.our_model(flags, remat=flags.remat)
        optimizer = make_optimizer(OPTIMIZER, 1000)
        learner = Learner(Spec(model, config), Optimizers(optimizer))
        update = functools.partial(learner.update, schedule=schedule)
        return timed(update, params, optimizer, seen, "loss/policy", firsts)

    schedule = schedule_of(by_count, jax.random.key(0), size.slots, seen.completions)
    makes = {
        "ours": functools.partial(make, by_count, schedule),
        "peer": functools.partial(make, padded, None),
    }
    slots = sum(len(p.rows) * (size.slots + p.shape[0] * p.shape[1]) for p in schedule.updates[0])
    line = {"case": "ragged", "variant": f"{slots} of {budget * size.prompts // 2} slots"}
    tokens = int(seen.completions.length.sum() + seen.prompts.length.sum())
    named = {"unit": "real tokens/s", "peer_name": "ours, padded"}
    return compared(flags, makes, firsts, tokens, line | named)


def ragged_batch(size: Workload, vocab: int) -> Experience:
    """Scored completions of every length, host arrays."""
    prompt = common.random_tokens((size.prompts, size.slots), vocab)
    completion = common.random_tokens((size.prompts, size.group, size.new), vocab, seed=1)
    length = lengths((size.prompts, size.group), size.new)
    mask = np.arange(size.new) < length[..., None]
    full = np.full(size.prompts, size.slots, np.int32)
    zeros = np.zeros(mask.shape, np.float32)
    advantage = np.random.default_rng(2).normal(size=(*length.shape, 1)) * mask
    prompts = PromptBatch(prompt, full)
    completions = Completions(completion, length, length < size.new, zeros, mask)
    # Old log-probabilities are not read.
    return Experience(prompts, completions, old_logp=zeros, advantage=advantage.astype(np.float32))


# --- the cold start -------------------------------------------------------------------------------------


def pack(flags: argparse.Namespace) -> list[Line]:
    """One chain a prompt, prompts of half to all of their slots: packed, and a padded row each."""
    size, vocab = common.workload("W", flags.shape), common.SHAPES[flags.shape]["vocab_size"]
    packed, padded = packed_batches(size, vocab)
    firsts: list[float] = []

    def make(batch: PackedBatch | SftBatch) -> Contender:
        model, params = common.our_model(flags, remat=flags.remat)
        optimizer = make_optimizer(OPTIMIZER, 1000)
        update = functools.partial(sft_update, SftSetup(model, optimizer))
        return timed(update, params, optimizer, batch, "loss/sft", firsts)

    makes = {"ours": functools.partial(make, packed), "peer": functools.partial(make, padded)}
    slots = padded.prompts.tokens.size + padded.tokens.size
    line = {"case": "pack", "variant": f"{packed.tokens.size} of {slots} slots"}
    named = {"unit": "real tokens/s", "peer_name": "ours, padded"}
    return compared(flags, makes, firsts, int((packed.segments > 0).sum()), line | named)


def packed_batches(size: Workload, vocab: int) -> tuple[PackedBatch, SftBatch]:
    """The chains of the first batch of packed rows: in them, and one padded row each."""
    count = 2 * size.rows
    prompts = common.random_tokens((count, size.slots), vocab)
    completions = common.random_tokens((count, size.new), vocab, seed=1)
    own = np.random.default_rng(4).integers(size.slots // 2, size.slots + 1, count)
    new = lengths((count,), size.new)
    data = [
        Demonstration(prompt[:p].tolist(), [completion[:n].tolist()])
        for prompt, p, completion, n in zip(prompts, own, completions, new, strict=True)
    ]
    rows = PackedStream(data, size.rows // 4 or 1, 2 * (size.slots + size.new), seed=0).batch(0)
    chains = [
        (tokens[(segments == i) & ~learn], tokens[(segments == i) & learn])
        for tokens, segments, learn in zip(rows.tokens, rows.segments, rows.learn, strict=True)
        for i in range(1, segments.max() + 1)
    ]
    prompt, prompt_length = padded([p for p, _ in chains], size.slots)
    completion, length = padded([c for _, c in chains], size.new)
    mask = np.arange(size.new) < length[:, None]
    packed = PackedBatch(rows.tokens, rows.segments, rows.positions, rows.learn)
    return packed, SftBatch(PromptBatch(prompt, prompt_length), completion[:, None], mask[:, None])


def padded(rows: list[np.ndarray], slots: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, slots] padded with zeros, length [B]) int32."""
    out = np.zeros((len(rows), slots), np.int32)
    for row, tokens in zip(out, rows, strict=True):
        row[: len(tokens)] = tokens
    return out, np.array([len(row) for row in rows], np.int32)
