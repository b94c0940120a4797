"""The programs of a run, lowered from shapes alone: the trainer's own jitted functions, nothing allocated.

Arguments are ShapeDtypeStructs that carry the shardings the trainer gives its arrays, over a mesh whose
devices need not exist. Batches are the largest ones the config allows: every prompt fills the last
bucket and every completion its budget.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped

from gtalign_jax.chain.grammar import chain_grammar
from gtalign_jax.learning.learner import Learner, experience_program, update_program
from gtalign_jax.learning.sft import PackedBatch, SftBatch, sft_update
from gtalign_jax.mesh.sharding import RULES, batch_shards, shard_state, shard_tree
from gtalign_jax.models import lora
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.heads import value_logical_axes
from gtalign_jax.models.lora import LoraConfig
from gtalign_jax.rollout import programs
from gtalign_jax.rollout.generator import limit_of
from gtalign_jax.rollout.grammar import Constraint, compile_constraint
from gtalign_jax.rollout.request import Ending, Placed, Rules
from gtalign_jax.run.settings import Settings
from gtalign_jax.run.states import align_state, make_learner, sft_setup, sft_state
from gtalign_jax.types import (
    Batch,
    Completions,
    Models,
    ModelState,
    PromptBatch,
    PyTree,
    Rollout,
    TrainState,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A jitted function with the abstract arguments of one call.

    resident: arrays that stay on the devices meanwhile and are no arguments. tokens: of one call. steps:
    iterations of loops whose number is only known at run time (tokens of a decode loop). calls: how often
    one training step runs it.
    """

    name: str
    mesh: Mesh
    function: Wrapped
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    resident: PyTree
    tokens: int
    steps: int = 1
    calls: int = 1

    @functools.cached_property
    def traced(self) -> Any:
        """The program traced under its mesh; `.lower()` lowers it for the mesh's devices."""
        # Only here is the mesh current: whatever runs eagerly under it would look for its devices.
        with jax.set_mesh(self.mesh):
            return self.function.trace(*self.args, **self.kwargs)

    def lower(self) -> Any:
        with jax.set_mesh(self.mesh):
            return self.traced.lower()


def replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """The shapes of a tree, each array whole on every device."""
    return placed(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree))


def by_prompt(tree: PyTree, mesh: Mesh) -> PyTree:
    """Arrays [P, ...] with their prompts split, as `sharding.place_batch` lays them out."""
    rows = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    return placed(tree, jax.tree.map(lambda _: rows, tree))


def by_prompt_where_possible(tree: PyTree, mesh: Mesh) -> PyTree:
    """As `by_prompt` for arrays whose first axis the mesh divides, whole elsewhere."""
    rows, whole = (NamedSharding(mesh, PartitionSpec(*part)) for part in ((RULES["batch"],), ()))

    def place(x: jax.ShapeDtypeStruct) -> NamedSharding:
        return rows if x.ndim > 0 and x.shape[0] % batch_shards(mesh) == 0 else whole

    return placed(tree, jax.tree.map(place, tree))


def placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Shapes with shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def abstract_params(model: ModelConfig, mesh: Mesh, adapters: LoraConfig | None = None) -> PyTree:
    """The policy's parameters as `job.load_start` and `adapters.add_adapters` lay them out."""
    adapters = adapters or LoraConfig()
    shapes = lora.abstract_params(model, adapters)
    return placed(shapes, shard_tree(lora.logical_axes(model, adapters), mesh, shapes))


def reference_params(settings: Settings, model: ModelConfig, mesh: Mesh) -> PyTree:
    """What the reference holds besides the arrays it shares with the policy: all, or its own adapters."""
    return lora.split(abstract_params(model, mesh, settings.lora))[0]


def abstract_base(settings: Settings, model: ModelConfig, mesh: Mesh) -> PyTree | None:
    """What the adapters stand on; None without any."""
    return lora.split(abstract_params(model, mesh, settings.lora))[1]


def abstract_state(
    state: TrainState,
    model: ModelConfig,
    mesh: Mesh,
    adapters: LoraConfig | None = None,
    offload: Sequence[str] = (),
) -> TrainState:
    """A state's shapes (from `jax.eval_shape`) with every learner and its moments split by the table.

    offload: the learners, `policy` and `critic`, whose moments wait in the host's memory.
    """

    def split(name: str, axes: PyTree) -> ModelState:
        shapes = getattr(state, name)
        params = shard_tree(axes, mesh, shapes.params)
        moments = shard_state(shapes.opt_state, params, mesh)
        if name in offload:
            moments = jax.tree.map(
                lambda x, s: s.with_memory_kind("pinned_host") if x.ndim else s, shapes.opt_state, moments
            )
        return placed(shapes, shapes.replace(params=params, opt_state=moments))

    adapters = adapters or LoraConfig()
    axes, _ = lora.split(lora.logical_axes(model, adapters))
    parts = {"policy": split("policy", axes)}
    if state.critic is not None:
        trunk = {name: part for name, part in axes.items() if name != "unembedding"}
        parts["critic"] = split("critic", value_logical_axes(model) | {"trunk": trunk})
    if state.reference is not None:
        parts["reference"] = placed(state.reference, shard_tree(axes, mesh, state.reference))
    rest = {
        field.name: replicated(getattr(state, field.name), mesh)
        for field in dataclasses.fields(state)
        if field.name not in ("policy", "critic", "reference")
    }
    return state.replace(**parts, **rest)


def sft_program(settings: Settings, model: ModelConfig, mesh: Mesh) -> Program:
    """The cold start's update; of how many is not known where they follow from epochs over demonstrations."""
    start, _ = lora.split(lora.abstract_params(model, settings.lora))
    setup = sft_setup(settings, model)
    state = jax.eval_shape(functools.partial(sft_state, settings, setup), start)
    state = abstract_state(state, model, mesh, settings.lora, ["policy"] * settings.sft_optimizer.offload)
    sft, n, array = settings.sft, settings.max_new_tokens, jax.ShapeDtypeStruct
    p, s, g = sft.prompts, settings.buckets.prompt[-1], 1 if sft.demonstrations else sft.chains
    weighted = sft.weighted
    batch: SftBatch | PackedBatch = SftBatch(
        PromptBatch(array((p, s), jnp.int32), array((p,), jnp.int32)),
        array((p, g, n), jnp.int32),
        array((p, g, n), bool),
        array((p, g, n), jnp.float32) if weighted else None,
    )
    tokens = p * (s + g * n)
    if sft.pack:
        tokens = p * sft.pack
        row = array((p, sft.pack), jnp.int32)
        weight = array(row.shape, jnp.float32) if weighted else None
        batch = PackedBatch(row, row, row, array(row.shape, bool), weight)
    args = (setup, state, by_prompt(batch, mesh), abstract_base(settings, model, mesh))
    return Program("sft", mesh, sft_update, args, {}, (), tokens)


def prefill_program(settings: Settings, model: ModelConfig, mesh: Mesh, resident: PyTree) -> Program:
    """The first half of generation: every prompt computed, the caches made."""
    p, s = settings.align.prompts_at_once, settings.buckets.prompt[-1]
    array = jax.ShapeDtypeStruct
    placed = Placed(
        prompts=by_prompt(PromptBatch(array((p, s), jnp.int32), array((p,), jnp.int32)), mesh),
        key=replicated(jax.eval_shape(lambda: jax.random.key(0)), mesh),
        group_size=settings.align.group_size,
        slots=settings.max_new_tokens,
        row=replicated(array((p,), jnp.int32), mesh),
    )
    params = abstract_params(model, mesh, settings.lora)
    args = (params, model, placed, settings.sampling, planned_rules(settings, model, mesh))
    calls = settings.align.prompts // p
    return Program("rollout prefill", mesh, programs.start, args, {}, resident, p * s, calls=calls)


def decode_program(
    settings: Settings, model: ModelConfig, mesh: Mesh, state: PyTree, resident: PyTree
) -> Program:
    """The second half: a token a step until every row ends. state: what prefill returns, with shardings."""
    n = settings.max_new_tokens
    params = abstract_params(model, mesh, settings.lora)
    args = (params, model, state, settings.sampling, planned_rules(settings, model, mesh))
    until = replicated(jax.ShapeDtypeStruct((), jnp.int32), mesh)
    p = settings.align.prompts_at_once
    tokens, calls = p * settings.align.group_size * n, settings.align.prompts // p
    return Program(
        "rollout decode", mesh, programs.advance, args, {"until": until}, resident, tokens, n, calls
    )


def planned_constraint(settings: Settings, model: ModelConfig) -> Constraint | None:
    """The grammar's tables for a vocabulary of single bytes, because no tokenizer is at hand: as many states
    as a run's and fewer classes of tokens; None without the grammar."""
    if not settings.engine.grammar:
        return None
    texts = [bytes([i]) if i < 256 else None for i in range(model.vocab_size)]
    return compile_constraint(chain_grammar(), texts, (model.vocab_size - 1,), settings.engine.limits)


def planned_rules(settings: Settings, model: ModelConfig, mesh: Mesh) -> Rules:
    """What rows are held to, abstract."""
    shapes = (
        jax.ShapeDtypeStruct((2,), jnp.int32),
        jax.eval_shape(lambda: planned_constraint(settings, model)),
    )
    eos, constraint = replicated(shapes, mesh)
    return Rules(Ending(eos), constraint)


def planned_learner(settings: Settings, model: ModelConfig) -> Learner:
    """The trainer's learner, under the filters and the grammar with the tables of `planned_constraint`."""
    limit = limit_of(planned_constraint(settings, model), settings.sampling, settings.max_new_tokens)
    return make_learner(settings, model, limit)


def planned_state(settings: Settings, learner: Learner, mesh: Mesh) -> TrainState:
    """The alignment's state at step 0, abstract, without completions that wait: no program reads them."""
    model = learner.spec.model
    start, _ = lora.split(lora.abstract_params(model, settings.lora))
    shapes = jax.eval_shape(functools.partial(align_state, settings, learner), start)
    configs = {"policy": settings.policy_optimizer, "critic": settings.critic_optimizer}
    offload = [name for name, config in configs.items() if config.offload]
    return abstract_state(shapes.replace(waiting=None), model, mesh, settings.lora, offload)


def abstract_models(settings: Settings, model: ModelConfig, mesh: Mesh, state: TrainState) -> Models:
    """What the experience is made with."""
    reference = state.reference
    if reference is None:
        reference = reference_params(settings, model, mesh)
    critic = None if state.critic is None else state.critic.params
    return Models(state.policy.params, reference, critic, abstract_base(settings, model, mesh))


def experience_call(
    settings: Settings, learner: Learner, mesh: Mesh, state: TrainState, resident: PyTree
) -> Program:
    """Advantages, old and reference logprobs and values of a whole rollout."""
    models = abstract_models(settings, learner.spec.model, mesh, state)
    args = (learner.spec, models, abstract_batch(settings, mesh), state.kl_coef, None)
    return Program("experience", mesh, experience_program, args, {}, resident, _sequence_tokens(settings))


def update_call(
    settings: Settings,
    learner: Learner,
    mesh: Mesh,
    state: TrainState,
    experience: PyTree,
    resident: PyTree,
) -> Program:
    """All mini-batch updates of the policy and the critic from one rollout."""
    tokens = settings.algorithm.epochs * _sequence_tokens(settings)
    base = abstract_base(settings, learner.spec.model, mesh)
    args = (learner.spec, learner.optimizers, state, experience, base)
    return Program("update", mesh, update_program, args, {}, resident, tokens)


def abstract_batch(settings: Settings, mesh: Mesh) -> Batch:
    """The batch of `run.groups.training_batch` in the config's largest shapes, laid out as the trainer's."""
    p, g, n = settings.align.prompts, settings.align.group_size, settings.max_new_tokens
    array, components = jax.ShapeDtypeStruct, None
    if settings.algorithm.needs_components:
        names = settings.algorithm.components
        components = replicated(array((len(names), p, g), jnp.float32), mesh)
    batch = Batch(
        rollout=abstract_rollout(settings),
        reward=array((p, g), jnp.float32),
        valid=array((p, g), bool),
        untrained=array((p, g, n), bool) if settings.align.untrained_blocks else None,
        response=array((p, g, n), bool) if settings.algorithm.needs_reference else None,
    )
    return by_prompt(batch, mesh).replace(components=components)


def abstract_rollout(settings: Settings) -> Rollout:
    """A rollout of the config's largest shapes, without shardings."""
    p, g, n = settings.align.prompts, settings.align.group_size, settings.max_new_tokens
    array = jax.ShapeDtypeStruct
    return Rollout(
        PromptBatch(array((p, settings.buckets.prompt[-1]), jnp.int32), array((p,), jnp.int32)),
        Completions(
            tokens=array((p, g, n), jnp.int32),
            length=array((p, g), jnp.int32),
            finished=array((p, g), bool),
            logp=array((p, g, n), jnp.float32),
            action_mask=array((p, g, n), bool),
        ),
    )


def _sequence_tokens(settings: Settings) -> int:
    """Tokens that one pass over a rollout reads: each prompt once, each completion once."""
    samples = settings.align.group_size * settings.max_new_tokens
    return settings.align.prompts * (settings.buckets.prompt[-1] + samples)
