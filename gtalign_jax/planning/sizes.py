"""The memory that a run's programs take, phase by phase, compiled and never run."""

import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from gtalign_jax.learning.learner import Learner
from gtalign_jax.mesh.memory import GIB, device_bytes, taken
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.planning import microbatches, programs
from gtalign_jax.planning.programs import Program
from gtalign_jax.run.settings import Settings
from gtalign_jax.types import PyTree

Say = Callable[[str], None]
Measure = Callable[[Program], tuple[dict[str, Any], Any]]


def sft_rows(settings: Settings, model: ModelConfig, mesh: Mesh, run: Measure) -> list[dict[str, Any]]:
    return [run(programs.sft_program(settings, model, mesh))[0]]


def rollout_rows(settings: Settings, model: ModelConfig, mesh: Mesh, run: Measure) -> list[dict[str, Any]]:
    """Prefill, and decoding from the caches it returns. The reference and the optimizers wait meanwhile."""
    waiting = beside_generation(settings, programs.planned_learner(settings, model), mesh)
    prefill = programs.prefill_program(settings, model, mesh, waiting)
    first, compiled = run(prefill)
    decode = programs.decode_program(settings, model, mesh, outputs(prefill, compiled, mesh), waiting)
    return [first, run(decode)[0]]


def beside_generation(settings: Settings, learner: Learner, mesh: Mesh) -> PyTree:
    """What is on the devices while the policy generates, besides its parameters."""
    state = programs.planned_state(settings, learner, mesh)
    reference = programs.reference_params(settings, learner.spec.model, mesh)
    return reference, state.replace(policy=state.policy.replace(params=()))


def learning_rows(settings: Settings, learner: Learner, mesh: Mesh, run: Measure) -> list[dict[str, Any]]:
    """Experience, and the update that reads it; by token count, their largest programs."""
    if settings.algorithm.microbatch_tokens:
        return [run(program)[0] for program in microbatches.microbatch_programs(settings, learner, mesh)]
    state = programs.planned_state(settings, learner, mesh)
    moments = (state.policy.opt_state, None if state.critic is None else state.critic.opt_state)
    experience = programs.experience_call(settings, learner, mesh, state, moments)
    first, compiled = run(experience)
    seen = outputs(experience, compiled, mesh)
    reference = programs.reference_params(settings, learner.spec.model, mesh)
    update = programs.update_call(settings, learner, mesh, state, seen, reference)
    return [first, run(update)[0]]


def outputs(program: Program, compiled: Any, mesh: Mesh) -> PyTree:
    """What a program returns, as the next one sees it: the compiler's shardings, or split by prompt."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.traced.out_info)
    if compiled is None:
        return programs.by_prompt_where_possible(shapes, mesh)
    return programs.placed(shapes, compiled.output_shardings)


def sized(program: Program, *, limit: float, say: Say) -> tuple[dict[str, Any], Any]:
    """(row, compiled program or None when the compiler found no room).

    limit: bytes that there are on a device. A row holds, for one device: argument_gib, temporary_gib,
    resident_gib (other arrays of the run), hbm_gib (all of it, with the outputs), fits; lower_s and
    compile_s, how long that took.
    """
    began = time.monotonic()
    resident = device_bytes(program.resident)
    lowered = program.lower()
    started = time.monotonic()
    row = {"name": program.name, "resident_gib": resident / GIB, "lower_s": started - began}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = out_of_memory(str(error))
        if needed is None:
            raise
        say(f"{program.name}: the compiler finds no room, {needed / GIB:.1f} GiB are needed")
        row |= {"hbm_gib": (needed + resident) / GIB, "fits": False, "compiled": False}
        return row | {"compile_s": time.monotonic() - started}, None
    row |= memory(compiled, resident, limit)
    return row | {"compiled": True, "compile_s": time.monotonic() - started}, compiled


def out_of_memory(message: str) -> float | None:
    """Bytes the compiler says it would need on one device, if this is what it says."""
    found = re.search(r"temporaries \(([\d.]+)([KMGT])\) exceeds", message)
    found = found or re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    return float(found[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]] if found else None


def memory(compiled: Any, resident: float, limit: float) -> dict[str, Any]:
    """The memory part of a row. Outputs that reuse the arguments' space are counted once."""
    stats = compiled.memory_analysis()
    # The temporaries are one block: the compiler's own peak, which may be smaller, is not what is taken.
    total = resident + stats.argument_size_in_bytes + taken(compiled)
    return {
        "argument_gib": stats.argument_size_in_bytes / GIB,
        "temporary_gib": stats.temp_size_in_bytes / GIB,
        "hbm_gib": total / GIB,
        "fits": total <= limit,
    }
