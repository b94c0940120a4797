"""A run on a TPU pod, planned without one: every program compiled ahead of time, and what it costs.

plan = make_plan(config, "v5e:16x16")      the trainer's own programs, compiled by libtpu, nothing allocated
print(table.format_plan(plan))             or json.dumps(plan)

Times are rooflines: for each program the largest of matrix work, memory traffic and collectives at the
chip's published limits, as if the three overlapped perfectly. A real step is slower. Generation is
counted at its full budget, every row to its last token; judges and the host are not counted.
"""

import dataclasses
import functools
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from gtalign_jax import config as config_lib
from gtalign_jax.mesh.sharding import batch_shards, make_mesh
from gtalign_jax.models import hf
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.planning import cost, hlo, programs
from gtalign_jax.planning.chips import GIB, Chip, seconds_on_wire, seconds_on_wires, topology
from gtalign_jax.planning.choose import choose
from gtalign_jax.planning.needs import needs_of_plan
from gtalign_jax.planning.programs import Program
from gtalign_jax.planning.sizes import Say, learning_rows, rollout_rows, sft_rows, sized
from gtalign_jax.planning.table import advice
from gtalign_jax.planning.traffic import traffic
from gtalign_jax.rollout.servers import EMBEDDED
from gtalign_jax.run import auto
from gtalign_jax.run.settings import Settings, check_batches, make_settings

STAGES = {"lowered": "lower_s", "compiled": "compile_s", "read": "read_s"}
HEADROOM = 0.02  # share of the memory that is left to the runtime


def make_plan(config: ml_collections.ConfigDict, name: str, say: Say = lambda line: None) -> dict[str, Any]:
    """The plan of a config on a topology, as JSON values; `say` is told of each program as it compiles.

    Keys: topology, chip, chips, mesh, model, chosen (for the chip, where fields say `auto`), parameters,
    programs (a list of rows, see `measure`), step (seconds, tokens_per_s, mfu_bound of one alignment step),
    fits, advice (a list of lines).
    Raises UserError on a config that the mesh cannot run.
    """
    settings = make_settings(config)
    chip, devices = topology(name)
    mesh = make_mesh(settings.mesh, devices)
    model, shards = architecture(config, settings), batch_shards(mesh)
    check_batches(settings, shards)
    chosen: dict[str, Any] = {}
    if auto.asked(config):
        chosen = choose(config, needs_of_plan(model, mesh, say), chip.hbm * (1 - HEADROOM), shards, say)
        config = auto.with_values(config, chosen)
        settings = make_settings(config)
        model = architecture(config, settings)
    rows = compile_all(settings, model, mesh, chip, say)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(hf.abstract_params(model)))
    plan = {
        "topology": name,
        "chip": chip.name,
        "chips": mesh.size,
        "hbm_gib": chip.hbm / GIB,
        "mesh": dict(mesh.shape),
        "model": config.start.path or "config.model",
        **({"chosen": chosen} if chosen else {}),
        "parameters": parameters,
        "programs": rows,
        "step": whole_step(settings, model, rows, chip, mesh.size, parameters),
        "fits": all(row["fits"] for row in rows),
    }
    return plan | {"advice": advice(plan) + unplanned(settings)}


def unplanned(settings: Settings) -> list[str]:
    """What a run with these settings does otherwise than its plan, a line each."""
    engine = settings.engine
    if not settings.align.steps:
        return []
    if engine.kind != EMBEDDED:
        return [f"config.engine.kind={engine.kind!r}: servers generate, the rollout is left out"]
    if engine.rows:
        return [f"config.engine.rows={engine.rows}: the rollout is planned with all rows at once, no queue"]
    return []


def architecture(config: ml_collections.ConfigDict, settings: Settings) -> ModelConfig:
    """The model a config describes, without its checkpoint: config.model, computed as config.start says."""
    fields = {**config.model, "vocab_size": settings.start.vocab_size}
    model = config_lib.build(ModelConfig, fields, "model")
    return dataclasses.replace(model, runtime=settings.start.runtime)


def compile_all(
    settings: Settings, model: ModelConfig, mesh: Mesh, chip: Chip, say: Say
) -> list[dict[str, Any]]:
    """A row for every program of the run, in the order in which it runs them.

    The cold start, generation and learning need nothing of each other, so they compile side by side.
    """
    run = functools.partial(measure, chip=chip, say=say)
    chains = [functools.partial(sft_rows, settings, model, mesh, run)] if settings.sft.trains else []
    if settings.align.steps and settings.engine.kind == EMBEDDED:
        chains += [functools.partial(rollout_rows, settings, model, mesh, run)]
    if settings.align.steps:
        learner = programs.planned_learner(settings, model)
        chains += [functools.partial(learning_rows, settings, learner, mesh, run)]
    with ThreadPoolExecutor(max_workers=len(chains) or 1) as pool:
        started = [pool.submit(chain) for chain in chains]
        return [row for chain in started for row in chain.result()]


def measure(program: Program, *, chip: Chip, say: Say) -> tuple[dict[str, Any], Any]:
    """`sizes.sized` with, for all calls of a training step, tflops, traffic_gb, collectives {kind: {count,
    gb}}, the three times and their largest, seconds; tokens of all devices; read_s, how long reading took."""
    row, compiled = sized(program, limit=chip.hbm * (1 - HEADROOM), say=say)
    if compiled is None:
        return row, None
    began = time.monotonic()
    row |= {"tokens": program.calls * program.tokens}
    row |= read_work(compiled, program, chip, say)
    row["read_s"] = time.monotonic() - began
    stages = ", ".join(f"{name} {row[key]:.0f} s" for name, key in STAGES.items())
    say(f"{program.name}: {stages}; {row['hbm_gib']:.1f} GiB a chip")
    return row, compiled


def read_work(compiled: Any, program: Program, chip: Chip, say: Say) -> dict[str, Any]:
    """The work part of a row; nothing, and why, for a program whose text the compiler cannot write."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        say(f"{program.name}: only its sizes, because its text cannot be had: {str(error).splitlines()[0]}")
        return {}
    return work(hlo.parse(text, program.steps), chip, program.calls)


def work(module: hlo.Module, chip: Chip, calls: int) -> dict[str, Any]:
    """The work part of a row."""
    flops, moved = calls * cost.flops(module), calls * traffic(module)
    found = [dataclasses.replace(c, times=calls * c.times) for c in cost.collectives(module)]
    kinds = {}
    for kind in cost.COLLECTIVES:
        mine = [item for item in found if item.kind == kind]
        if mine:
            volume = sum(item.bytes * item.times for item in mine)
            kinds[kind] = {"count": sum(item.times for item in mine), "gb": volume / 1e9}
    wire = [(seconds_on_wire(item, chip), item) for item in found]
    times = {
        "matmul_s": flops / chip.flops,
        "memory_s": moved / chip.bandwidth,
        "network_s": seconds_on_wires(found, chip),
    }
    row = {"tflops": flops / 1e12, "traffic_gb": moved / 1e9, "collectives": kinds, **times}
    if wire:
        row["largest_collective"] = describe(*max(wire, key=lambda pair: pair[0]))
    longest = max(times, key=lambda name: times[name])
    return row | {"seconds": times[longest], "bound": longest.removesuffix("_s")}


def describe(seconds: float, item: cost.Collective) -> dict[str, Any]:
    """A collective as JSON values; from: the operation it serves."""
    path = item.where.split("/")
    source = path[-2] if len(path) > 1 else item.where
    shape = list(item.shape)
    return {"kind": item.kind, "shape": shape, "times": item.times, "seconds": seconds, "from": source}


def useful_flops(settings: Settings, model: ModelConfig, parameters: int) -> float:
    """Matrix operations that one alignment step needs at least, all chips together.

    2 per parameter and token forward and 4 backward, and causal attention likewise; nothing recomputed.
    """
    s, n = settings.buckets.prompt[-1], settings.max_new_tokens
    p, g = settings.align.prompts, settings.align.group_size
    tokens = p * (s + g * n)
    pairs = p * (s * s / 2 + g * (n * s + n * n / 2))
    embedding = model.vocab_size * model.hidden_size
    dense = parameters - embedding * (1 if model.tie_embeddings else 2)
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * pairs
    forward = 2 * dense * tokens + attention
    scored = 2 * embedding * p * g * n
    algorithm = settings.algorithm
    fresh = not algorithm.on_policy or algorithm.is_cap > 0 or algorithm.kl_place == "reward"
    policy_passes = fresh + algorithm.needs_reference + 3 * algorithm.epochs
    critic_passes = algorithm.needs_critic * (1 + 3 * algorithm.epochs)
    return policy_passes * (forward + scored) + critic_passes * forward


def whole_step(
    settings: Settings, model: ModelConfig, rows: list[dict], chip: Chip, chips: int, parameters: int
) -> dict[str, float] | None:
    """Seconds, tokens a second and the bound on MFU of one alignment step; None if a program is missing."""
    mine = [row for row in rows if row["name"] != "sft"]
    if not mine or not all("seconds" in row for row in mine):
        return None
    seconds = sum(row["seconds"] for row in mine)
    tokens = settings.align.prompts * settings.align.group_size * settings.max_new_tokens
    needed = useful_flops(settings, model, parameters)
    return {
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "mfu_bound": needed / (seconds * chips * chip.flops),
    }
