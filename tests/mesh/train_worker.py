"""One process of a small training run; the address comes from the environment.

    python tests/mesh/train_worker.py FOLDER MESH_JSON PHASES

FOLDER holds the model as `start`. PHASES: `sft`, or `sft,grpo,ppo`. The run writes `checkpoints`, `hf` and,
from process 0, the weights after each phase (of `ppo` the critic's too) and `result.json`.
The tests call `run` in their own process for the curve of one process.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gtalign_jax.data import loader
from gtalign_jax.data.order import Batching, Order
from gtalign_jax.data.stream import Left, Reading, Stream
from gtalign_jax.errors import UserError
from gtalign_jax.learning.algorithm import PRESETS
from gtalign_jax.learning.learner import Learner
from gtalign_jax.learning.sft import SftBatch, SftSetup, sft_update
from gtalign_jax.learning.spec import Spec
from gtalign_jax.learning.state import OptimizerConfig, init_model, init_state, make_optimizer
from gtalign_jax.learning.update import Optimizers
from gtalign_jax.mesh import cluster, processes
from gtalign_jax.mesh.sharding import MeshConfig, batch_shards, make_mesh, shard_state, shard_tree, spread
from gtalign_jax.models import hf, stored, transformer
from gtalign_jax.models.config import ModelConfig, RuntimeConfig, read_config
from gtalign_jax.models.heads import init_value_model
from gtalign_jax.run import checkpoint
from gtalign_jax.types import Batch, Completions, Models, ModelState, PromptBatch, Rollout

MODEL = ModelConfig(
    family="llama",
    qkv_bias=False,
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    runtime=RuntimeConfig(scan_layers=False),
    initializer_range=0.3,
)
EXAMPLES, BATCH, GROUP, SLOTS, WIDTH, STEPS = 24, 8, 2, 3, 5, 4
OPTIMIZER = make_optimizer(OptimizerConfig(lr=0.01), STEPS)
SGD = optax.sgd(0.1)  # quick to compile, and what rounding leaves of a gradient of zero stays small
ALGORITHMS = {  # without a reference, which is one more forward pass
    # In micro-batches by token count: old logprobs are read for the weights, so that all of it runs.
    "grpo": dataclasses.replace(PRESETS["grpo"], kl_coef=0.0, is_cap=2.0, microbatch_tokens=52),
    "ppo": dataclasses.replace(PRESETS["ppo"], kl_coef=0.0, minibatches=2),
}


def examples():
    """(prompt [E, S], prompt_length [E], completion [E, G, N], length [E, G]) of all examples."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(2, 32, shape).astype(np.int32)
    count = lambda top, *shape: rng.integers(1, top + 1, shape).astype(np.int32)
    prompts = draw(EXAMPLES, SLOTS), count(SLOTS, EXAMPLES)
    return *prompts, draw(EXAMPLES, GROUP, WIDTH), count(WIDTH, EXAMPLES, GROUP)


def local_rows(step, mesh):
    """The examples of a step that this host's devices hold."""
    return loader.step_rows(EXAMPLES, BATCH, 0, step)[processes.host_rows(BATCH, mesh)]


def sft_batch(step, mesh):
    """The global batch of a step, of which this host makes its own rows."""
    prompt, prompt_length, completion, length = (x[local_rows(step, mesh)] for x in examples())
    mask = np.arange(WIDTH) < length[..., None]
    batch = SftBatch(PromptBatch(prompt, prompt_length), completion, mask)
    return processes.global_batch(batch, BATCH, mesh)


def scored_batch(step, mesh):
    """The global batch of a made-up rollout."""
    prompt, prompt_length, completion, length = (x[local_rows(step, mesh)] for x in examples())
    mask = np.arange(WIDTH) < length[..., None]
    logp = np.where(mask, -1.0, 0.0).astype(np.float32)
    completions = Completions(completion, length, length < WIDTH, logp, mask)
    rollout = Rollout(PromptBatch(prompt, prompt_length), completions)
    reward = (completion[..., 0] / 32).astype(np.float32)
    return processes.global_batch(Batch(rollout, reward, np.ones_like(length, bool)), BATCH, mesh)


def run(folder: pathlib.Path, mesh, phases=("sft", "grpo", "ppo")):
    """(what process 0 reports, weights after each phase)."""
    config = read_config(folder / "start", RuntimeConfig(scan_layers=False))
    shardings = shard_tree(transformer.logical_axes(config), mesh, hf.abstract_params(config))
    with jax.set_mesh(mesh), counted_reads() as read:
        params = hf.load_params(folder / "start", config, shardings)
        result = {"read": processes.all_gather(sum(read))}
        result["fault"] = processes.all_gather(fault_of_the_last(folder, config, shardings))
        state = start_state(params, shardings, mesh)
        state, result["losses"] = sft(state, config, mesh)
        manager = checkpoint.open_manager(folder / "checkpoints", keep=2)
        checkpoint.save(manager, STEPS, state, {"step": STEPS, "processes": jax.process_count()})
        manager.wait_until_finished()
        hf.save_params(state.policy.params, config, folder / "hf", max_shard_bytes=4000)
        weights = {"sft": processes.fetch(state.policy.params)}
        for phase in phases[1:]:
            state, result[phase] = align_step(phase, state, config, mesh)
            models = [state.policy] if state.critic is None else [state.policy, state.critic]
            weights[phase] = processes.fetch([model.params for model in models])
    return result, weights


@contextlib.contextmanager
def counted_reads():
    """Yields a list that grows by the bytes of every read of a checkpoint file."""
    plain, read = stored.read_slice, []

    def count(tensor, index):
        part = plain(tensor, index)
        read.append(part.nbytes)
        return part

    stored.read_slice = count
    yield read
    stored.read_slice = plain


def fault_of_the_last(folder, config, shardings):
    """What this process says of a file that only the last process finds damaged."""
    plain = stored.read_slice

    def read(tensor, index):
        if jax.process_index() == jax.process_count() - 1:
            raise UserError(f"{tensor.file.name}: damaged for process {jax.process_index()}")
        return plain(tensor, index)

    stored.read_slice = read
    try:
        hf.load_params(folder / "start", config, shardings)
    except UserError as error:
        return str(error)
    finally:
        stored.read_slice = plain


def start_state(params, shardings, mesh):
    """The state at step 0, its moments split as the parameters: one program instead of one an array."""
    make = lambda params: init_model(params, OPTIMIZER)
    moments = shard_state(jax.eval_shape(make, params).opt_state, shardings, mesh)
    policy = jax.jit(make, out_shardings=ModelState(shardings, moments))(params)
    return spread(init_state(jax.random.key(3), policy), mesh)


def sft(state, config, mesh, steps=range(STEPS)):
    """(state after these steps, their losses)."""
    setup, losses = SftSetup(config, OPTIMIZER), []
    for step in steps:
        state, metrics = sft_update(setup, state, sft_batch(step, mesh))
        losses.append(float(metrics["loss/sft"].value))
    return state, losses


def align_step(name, state, config, mesh):
    """(state, metrics) after the updates of one rollout; PPO's critic begins with the policy's trunk."""
    algorithm = ALGORITHMS[name]
    params, critic = state.policy.params, None
    if algorithm.needs_critic:
        critic = init_model(start_critic(params, config, mesh), SGD)
    state = state.replace(policy=init_model(params, SGD), critic=critic)
    learner, batch = Learner(Spec(config, algorithm), Optimizers(SGD, SGD)), scored_batch(STEPS, mesh)
    schedule = learner.schedule(state.rng, processes.fetch(batch.rollout), batch_shards(mesh))
    models = Models(params, critic=critic and critic.params)
    experience = learner.experience(models, batch, schedule=schedule)
    state, metrics = learner.update(state, experience, schedule=schedule)
    return state, {name: float(ratio.value) for name, ratio in metrics.items()}


def start_critic(params, config, mesh):
    """A critic whose values differ from token to token, so that GAE has something to do."""

    def make(params):
        critic = init_value_model(jax.tree.map(jnp.copy, params), config)
        return critic | {"head": jnp.linspace(-1.0, 1.0, config.hidden_size)}

    return spread(jax.jit(make)(params), mesh)


def agreements():
    """What the gathers give on this process, with what they should."""
    index, count = jax.process_index(), jax.process_count()
    assert processes.all_gather({"host": index, "text": "x" * 3000 * index}) == [
        {"host": i, "text": "x" * 3000 * i} for i in range(count)
    ]
    assert processes.total({"all": 1.0, f"only_{index}": 2.0}) == {"all": float(count)} | {
        f"only_{i}": 2.0 for i in range(count)
    }
    assert processes.any_process(index == count - 1) and not processes.any_process(False)
    assert processes.from_main(lambda: index) == 0
    assert sum(processes.all_gather(list(range(10))[processes.part(10)]), []) == list(range(10))
    with pytest.raises(ZeroDivisionError, match="zero"):
        processes.from_main(lambda: 1 // index)
    assert streamed_rows(Reading(index, count, processes.exchanged)) == streamed_rows(Reading())
    processes.all_gather(None)  # nobody leaves before the others are done


def streamed_rows(reading):
    """Two epochs of a stream of which this process reads its share."""

    def make(numbers):
        return [Left(f"row {n}", "is odd") if n % 5 == 2 else n for n in numbers]

    feed = Stream(make, Order((100,), 7), Batching(8, lambda row: 8, 7), reading)
    rows = [row for k in range(20) for row in feed.batch(k)]
    assert sorted(rows[:80]) == sorted(rows[80:]) == [n for n in range(100) if n % 5 != 2]
    return rows


def main(folder: pathlib.Path, mesh: dict, phases: str) -> None:
    jax.config.update("jax_disable_most_optimizations", True)  # half the time to compile
    assert cluster.initialize(timeout_s=60) is not None
    agreements()
    result, weights = run(folder, make_mesh(MeshConfig(**mesh)), phases.split(","))
    if processes.is_main():
        for name, tree in weights.items():
            np.savez(folder / name, *jax.tree.leaves(tree))
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])
