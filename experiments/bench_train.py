"""A training step, forward, backward and AdamW, in tokens a second; one JSON line a case and variant.

    python -m experiments.bench_train [--case=NAME] [--repeats=3]

    W        4 prompts x 8 completions, 64 and 128 tokens: a supervised step
    R        the same with 512 prompt tokens; separate rows one contender after the other, for their memory
    policy   W with the clipped policy-gradient loss
    growth   W's quarter at once, twice and four times the batch, the length and the depth
    memory   temporary bytes of the compiled step as tokens and vocabulary grow; nothing is run
    ragged   twice W's prompts with log-normal lengths: micro-batches by token count beside padded ones
    pack     chains of log-normal lengths: a supervised step on packed rows beside padded ones

Ours are `learning.sft.sft_update` and the update of `learning.learner`, as `experiments.train` calls them:
`shared` has a group's prompt once, `rows` repeats it for every completion. The peer is transformers'
Qwen2 in eager PyTorch on separate rows without padding, logits at the completions only, with the same
weights, tokens, clipping and AdamW; that the first losses agree is checked. Every rate counts the tokens
of separate rows, whoever computes fewer. limit: the rate at which the products that a variant cannot
avoid run at the measured matmul peak; share = ours / limit. Seconds of every round are in the line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np

from experiments import bench_common as common
from experiments import bench_lengths
from experiments import bench_limits as limits
from experiments.bench_common import Contender, Line, Workload
from experiments.peers import launch
from gtalign_jax.errors import exit_on_user_error
from gtalign_jax.learning.algorithm import AlgorithmConfig
from gtalign_jax.learning.learner import Learner
from gtalign_jax.learning.sft import SftBatch, SftSetup, sft_update
from gtalign_jax.learning.spec import Spec
from gtalign_jax.learning.state import Optimizer, OptimizerConfig, init_model, init_state, make_optimizer
from gtalign_jax.learning.update import Optimizers
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh, spread
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.transformer import init_params
from gtalign_jax.types import Completions, Experience, PromptBatch, PyTree, TrainState

OPTIMIZER = OptimizerConfig(lr=1e-5)
ALGORITHM = AlgorithmConfig()
VARIANTS = ("shared", "rows")
TARGETS = {("W", "rows"): 1.0, ("W", "shared"): 1.4, ("R", "shared"): 3.0}
ONE_BY_ONE = ("R", "rows")  # both at once would take more than 24 GB


@dataclasses.dataclass(frozen=True)
class Tokens:
    """prompt [P, S], completion [P, G, N] int32, advantage [P, G] float32; every slot is a token."""

    prompt: np.ndarray
    completion: np.ndarray
    advantage: np.ndarray

    def separate(self) -> Tokens:
        """The same as P*G prompts with one completion each."""
        prompts, group, width = self.completion.shape
        return Tokens(
            np.repeat(self.prompt, group, axis=0),
            self.completion.reshape(prompts * group, 1, width),
            self.advantage.reshape(prompts * group, 1),
        )


def make_tokens(size: Workload, vocab: int) -> Tokens:
    return Tokens(
        common.random_tokens((size.prompts, size.slots), vocab),
        common.random_tokens((size.prompts, size.group, size.new), vocab, seed=1),
        np.random.default_rng(2).normal(size=(size.prompts, size.group)).astype(np.float32),
    )


# --- ours ---------------------------------------------------------------------------------------------


def make_batch(tokens: Tokens, policy: bool) -> SftBatch | Experience:
    """What the supervised or the policy update sees of these tokens."""
    prompts = PromptBatch(tokens.prompt, np.full(len(tokens.prompt), tokens.prompt.shape[1], np.int32))
    everywhere, zeros = np.ones(tokens.completion.shape, bool), np.zeros(tokens.completion.shape, np.float32)
    if not policy:
        return SftBatch(prompts, tokens.completion, everywhere)
    completions = Completions(
        tokens=tokens.completion,
        length=np.full(tokens.advantage.shape, tokens.completion.shape[-1], np.int32),
        finished=np.ones(tokens.advantage.shape, bool),
        logp=zeros,  # compared with the trainer's, for two metrics
        action_mask=everywhere,
    )
    return Experience(
        prompts,
        completions,
        old_logp=zeros,  # one update a rollout: not read
        advantage=np.where(everywhere, tokens.advantage[..., None], 0.0).astype(np.float32),
    )


def sft_setup(config: ModelConfig) -> SftSetup:
    return SftSetup(config, make_optimizer(OPTIMIZER, 1000))


def start_state(params: PyTree, optimizer: Optimizer) -> TrainState:
    return init_state(jax.random.key(0), init_model(params, optimizer))


def our_run(config: ModelConfig, params: PyTree, tokens: Tokens, policy: bool) -> Contender:
    """One update a call; returns its loss."""
    setup, mesh = sft_setup(config), make_mesh(MeshConfig())
    learner = Learner(Spec(config, ALGORITHM), Optimizers(setup.optimizer))
    update = learner.update if policy else functools.partial(sft_update, setup)
    # Laid out as in training, or the second call would compile again for the state that the first returns.
    batch = spread(jax.device_put(make_batch(tokens, policy)), mesh)
    held = {"state": spread(start_state(params, setup.optimizer), mesh)}

    def run() -> float:
        held["state"], metrics = update(held["state"], batch)
        jax.block_until_ready(held["state"])
        return float(metrics["loss/policy" if policy else "loss/sft"].value)

    return run


# --- the peer -----------------------------------------------------------------------------------------


def torch_process(
    flags: argparse.Namespace, tokens: Tokens, policy: bool
) -> contextlib.AbstractContextManager[launch.Peer]:
    """The process of `peers/torch_train.py` on these tokens in separate rows."""
    made = tokens.separate()
    arrays = {"prompt": made.prompt, "completion": made.completion[:, 0], "advantage": made.advantage}
    return launch.torch_peer(
        "torch_train.py",
        flags,
        arrays,
        policy=policy,
        remat=flags.remat != "none",
        lr=OPTIMIZER.lr,
        weight_decay=OPTIMIZER.weight_decay,
        clip_norm=OPTIMIZER.clip_norm,
        clip=(ALGORITHM.clip_low, ALGORITHM.clip_high),
    )


# --- cases --------------------------------------------------------------------------------------------


def against_peer(name: str, variant: str, flags: argparse.Namespace, policy: bool = False) -> list[Line]:
    """Ours with shared prompts or with separate rows, beside the peer in its own process."""
    size = common.workload("W" if policy else name, flags.shape)
    fields = common.SHAPES[flags.shape]
    tokens = make_tokens(size, fields["vocab_size"])
    mine = tokens if variant == "shared" else tokens.separate()
    losses: dict[str, float] = {}
    with contextlib.ExitStack() as stack:

        def peer() -> Contender:
            process = stack.enter_context(torch_process(flags, tokens, policy))
            return lambda: process()["loss"]

        makes = {
            variant: lambda: our_run(*common.our_model(flags, remat=flags.remat), mine, policy),
            "peer": peer,
        }
        makes = {n: functools.partial(keep_first_loss, losses, n, make) for n, make in makes.items()}
        together = flags.device == "cpu" and (name, variant) != ONE_BY_ONE
        seconds = common.time_rounds(flags.repeats, makes, together=together)
    check_losses(losses, flags.dtype)
    line: Line = {"case": name, "variant": variant, "unit": "row tokens/s", "peer_name": "PyTorch eager"}
    line |= common.compare(seconds[variant], seconds["peer"], size.rows * (size.slots + size.new))
    line |= share_of_limit(line["ours"], fields, size, flags.dtype, shared=variant == "shared")
    return [{**line, "target": TARGETS.get((name, variant))}]


def share_of_limit(ours: float, fields: dict, size: Workload, dtype: str, *, shared: bool) -> Line:
    """The rate at the matmul peak, and what part of it ours is: model FLOPs over peak FLOPs."""
    seconds = limits.step_flops(fields, size, shared=shared) / common.machine(dtype)[0]
    limit = size.rows * (size.slots + size.new) / seconds
    return {"limit": round(limit, 1), "share": round(ours / limit, 3)}


def keep_first_loss(losses: dict[str, float], name: str, make: common.Make) -> Contender:
    """The contender, with the loss of its first round kept."""
    run = make()

    def kept() -> None:
        losses.setdefault(name, run())

    return kept


def check_losses(losses: dict[str, float], dtype: str) -> None:
    """RuntimeError when the contenders did not begin with the same loss: they would do different work."""
    tolerance = {"float32": 1e-3, "bfloat16": 5e-2}[dtype]
    if max(losses.values()) - min(losses.values()) > tolerance * max(1.0, abs(losses["peer"])):
        raise RuntimeError(f"the first losses differ: {losses}")


def growth(name: str, factor: int, flags: argparse.Namespace) -> list[Line]:
    """A quarter of W, one of its sizes grown; shared prompts, ours alone."""
    fields, size = dict(common.SHAPES[flags.shape]), common.workload("W", flags.shape)
    size = dataclasses.replace(size, prompts=1)
    config = common.our_config(flags, remat=flags.remat)
    if name == "batch":
        size = dataclasses.replace(size, prompts=factor)
    elif name == "length":
        size = dataclasses.replace(size, slots=size.slots * factor, new=size.new * factor)
    elif name == "depth":
        fields["num_hidden_layers"] *= factor
        config = dataclasses.replace(config, num_layers=config.num_layers * factor, source="")
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    make = functools.partial(our_run, config, params, make_tokens(size, fields["vocab_size"]), False)
    seconds = common.time_rounds(flags.repeats, {"ours": make})["ours"]
    line: Line = {"case": "growth", "variant": f"{name} x{factor}", "unit": "row tokens/s"}
    line |= common.compare(seconds, None, size.rows * (size.slots + size.new))
    return [line | share_of_limit(line["ours"], fields, size, flags.dtype, shared=True)]


def memory(name: str, factor: int, flags: argparse.Namespace) -> list[Line]:
    """Temporary bytes of the compiled supervised step; a gradient as large as the weights is among them."""
    config = common.our_config(flags, remat=flags.remat)
    size = dataclasses.replace(common.workload("W", flags.shape), prompts=1)
    if name == "tokens":
        size = dataclasses.replace(size, prompts=factor)
    elif name == "vocabulary":
        config = dataclasses.replace(config, vocab_size=config.vocab_size * factor, source="")
    setup = sft_setup(config)
    params = jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0))
    state = jax.eval_shape(functools.partial(start_state, optimizer=setup.optimizer), params)
    batch = make_batch(make_tokens(size, config.vocab_size), policy=False)
    sizes = sft_update.lower(setup, state, batch).compile().memory_analysis()
    assert sizes is not None  # XLA knows them
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return [
        {
            "case": "memory",
            "variant": f"{name} x{factor}",
            "unit": "MiB",
            "weights": mebibytes(weights),
            "temporary": mebibytes(sizes.temp_size_in_bytes),
            "beyond_gradient": mebibytes(sizes.temp_size_in_bytes - weights),
            "tokens": size.prompts * size.slots + size.rows * size.new,
        }
    ]


def mebibytes(count: int) -> float:
    return round(count / 2**20, 1)


def cases(flags: argparse.Namespace) -> dict[str, Sequence[Callable[[], list[Line]]]]:
    """Name -> what to measure, in the order of the docstring."""
    grown = [(name, factor) for name in ("batch", "length", "depth") for factor in (2, 4)]
    sizes = [("tokens", 1), ("tokens", 2), ("tokens", 4), ("vocabulary", 2), ("vocabulary", 4)]
    return {
        "W": [functools.partial(against_peer, "W", variant, flags) for variant in VARIANTS],
        "R": [functools.partial(against_peer, "R", variant, flags) for variant in VARIANTS],
        "policy": [functools.partial(against_peer, "policy", v, flags, policy=True) for v in VARIANTS],
        "growth": [functools.partial(growth, *grow, flags) for grow in [("batch", 1), *grown]],
        "memory": [functools.partial(memory, *grow, flags) for grow in sizes],
        "ragged": [functools.partial(bench_lengths.ragged, flags)],
        "pack": [functools.partial(bench_lengths.pack, flags)],
    }


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    common.add_flags(parser)
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
    argv = sys.argv[1:] if argv is None else argv
    flags = parser.parse_args(argv)
    common.restart_tuned("experiments.bench_train", argv, flags)
    common.run_cases("train", flags, cases(flags))


if __name__ == "__main__":
    main()
