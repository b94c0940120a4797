"""The plan itself: what it refuses, how it sums up, and a program compiled for a TPU that is not here."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import pytest

from configs import quickstart
from gtalign_jax.errors import UserError
from gtalign_jax.mesh.memory import device_bytes
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh
from gtalign_jax.models.config import ModelConfig, RuntimeConfig
from gtalign_jax.planning import chips, programs, sizes
from gtalign_jax.planning import plan as plan_lib
from gtalign_jax.planning.table import advice, format_plan
from gtalign_jax.run.settings import make_settings

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    runtime=RuntimeConfig(compute_dtype="bfloat16"),
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install libtpu"
)


@pytest.mark.parametrize("name", ["h100:8", "v5e", "v5e:16", "v5e:axb", "tpu:4x4"])
def test_what_is_no_topology_is_refused(name):
    with pytest.raises(UserError, match="write CHIP:AxB"):
        chips.topology(name)


@pytest.mark.parametrize(
    "name", ["v5e:0x4", "v5e:16x32", "v5e:2x2x2", "v4:2x2x0", "v5p:4x4", "v6e:999999999x1"]
)
def test_a_slice_that_no_chip_has_never_reaches_the_compiler(name):
    """It would end the process with a signal, or plan for what cannot be had."""
    with pytest.raises(UserError, match=f"--topology={name}: a slice of TPU .* is from 1x1"):
        chips.topology(name)


def test_a_missing_compiler_is_one_line_with_its_mend(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install libtpu"):
        chips.topology("v5e:4x4")


def test_the_compilers_refusals_are_read():
    g = 2.0**30
    temporaries = "memory required for HLO temporaries (21.21G) exceeds available HBM (15.75G)."
    assert sizes.out_of_memory(temporaries) == 21.21 * g
    assert sizes.out_of_memory("Used 30.5G of 15.75G hbm. Exceeded hbm capacity") == 30.5 * g
    assert sizes.out_of_memory("INVALID_ARGUMENT: something else") is None


def test_useful_work_is_that_of_the_equations():
    config = quickstart.get_config()
    config.max_new_tokens, config.buckets.prompt, config.buckets.completion = 6, (4,), (6,)
    config.align.update(algorithm="grpo", prompts=2, group_size=3)
    settings = make_settings(config)
    layer = 256 * (4 + 2 * 2) * 64 + 4 * 64 * 256 + 3 * 256 * 512
    parameters = 2 * layer + 512 * 256
    pairs = sum(4 * 4 / 2 + 3 * (6 * 4 + 6 * 6 / 2) for _ in range(2))
    forward = 2 * 2 * layer * 2 * (4 + 3 * 6) + 4 * 2 * 4 * 64 * pairs
    logits = 2 * 512 * 256 * 2 * 3 * 6
    # On-policy GRPO: the reference forward, the policy forward and backward.
    expected = (1 + 3) * (forward + logits)
    assert plan_lib.useful_flops(settings, MODEL, parameters) == pytest.approx(expected)


def plan_of(*rows):
    base = {"topology": "v5e:4x4", "chip": "TPU v5e", "chips": 16, "hbm_gib": 15.75, "mesh": {"fsdp": 16}}
    fits = all(row["fits"] for row in rows)
    return base | {"model": "m", "parameters": 3e9, "programs": rows, "fits": fits, "step": None}


ROW = {
    "name": "update",
    "compiled": True,
    "fits": True,
    "argument_gib": 4.0,
    "temporary_gib": 3.0,
    "resident_gib": 1.0,
    "hbm_gib": 8.0,
    "tflops": 10.0,
    "traffic_gb": 5.0,
    "matmul_s": 1.0,
    "memory_s": 2.0,
    "network_s": 3.0,
    "seconds": 3.0,
    "bound": "network",
    "collectives": {"all-gather": {"count": 7, "gb": 1.5}},
    "largest_collective": {
        "kind": "all-gather", "shape": [8, 2], "times": 7.0, "seconds": 2.5, "from": "Block/up",
    },
}  # fmt: skip


def test_the_table_names_the_verdict_and_the_knob():
    plan = plan_of(ROW)
    text = format_plan(plan | {"advice": advice(plan)})
    assert "verdict: fits" in text and "| update | 4.00 | 3.00 | 1.00 | 8.00 | yes |" in text
    assert "update waits for the network: all-gather [8, 2] x 7 (Block/up)" in text
    full = {"name": "update", "compiled": False, "fits": False, "hbm_gib": 21.2, "resident_gib": 1.0}
    plan = plan_of(full)
    text = format_plan(plan | {"advice": advice(plan)})
    assert "verdict: does not fit" in text and "algorithm.microbatches" in text


def test_a_program_whose_text_the_compiler_cannot_write_keeps_its_sizes():
    """As libtpu 0.0.52 does of the 32B cold start on v5p."""

    class Compiled:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nmore")

    said = []
    program = programs.Program("rollout prefill", None, None, (), {}, (), 8)
    assert plan_lib.read_work(Compiled(), program, chips.CHIPS["v5p"], said.append) == {}
    assert said == [
        "rollout prefill: only its sizes, because its text cannot be had: INTERNAL: RET_CHECK failure"
    ]
    sizes = {name: ROW[name] for name in ROW if name.endswith("_gib")}
    unread = {"name": "rollout prefill", "compiled": True, "fits": True, **sizes}
    plan = plan_of(unread, ROW)
    text = format_plan(plan | {"advice": advice(plan)})
    assert (
        "| rollout prefill | 4.00 | 3.00 | 1.00 | 8.00 | yes | | | | | | |" in text and "| update | 7" in text
    )
    assert plan_lib.whole_step(None, None, [unread, ROW], None, 16, 1) is None


def test_a_plan_says_what_it_leaves_out(monkeypatch):
    config = quickstart.get_config()
    assert plan_lib.unplanned(make_settings(config)) == []
    config.engine.rows = 64
    (line,) = plan_lib.unplanned(make_settings(config))
    assert "engine.rows=64" in line and "all rows at once" in line
    config.engine.rows = 0
    config.engine.update(kind="vllm", endpoints=("http://host:8000/v1",))
    (line,) = plan_lib.unplanned(make_settings(config))
    assert "'vllm'" in line and "rollout" in line
    chains = {name: lambda *_, name=name: [name] for name in ("sft_rows", "rollout_rows", "learning_rows")}
    for name, chain in chains.items():
        monkeypatch.setattr(plan_lib, name, chain)
    planned = plan_lib.compile_all(make_settings(config), MODEL, None, None, None)
    assert planned == ["sft_rows", "learning_rows"]


@needs_libtpu
def test_a_program_compiles_for_a_slice_that_is_not_here():
    chip, devices = chips.topology("v5e:2x4")
    assert len(devices) == 8 and devices[0].platform == "tpu"
    config = quickstart.get_config()
    config.max_new_tokens, config.buckets.prompt, config.buckets.completion = 128, (128,), (128,)
    config.align.update(prompts=8, group_size=2)
    settings, mesh = make_settings(config), make_mesh(MeshConfig(fsdp=4, tensor=2), devices)
    waiting = programs.abstract_params(MODEL, mesh)
    prefill = programs.prefill_program(settings, MODEL, mesh, waiting)
    row, compiled = plan_lib.measure(prefill, chip=chip, say=lambda line: None)
    assert row["fits"] and compiled is not None
    split = device_bytes(waiting)
    assert split < device_bytes(programs.replicated(waiting, mesh)) / 7
    assert row["resident_gib"] * 2**30 == split
    assert row["argument_gib"] * 2**30 >= split
    stats = compiled.memory_analysis()
    needs = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes
    assert row["hbm_gib"] * 2**30 == pytest.approx(split + needs - stats.alias_size_in_bytes)
    layer = 256 * (4 + 2 * 2) * 64 + 4 * 64 * 256 + 3 * 256 * 512
    products = 2 * 2 * layer * 8 * 128 + 2 * 512 * 256 * 8  # layers, and the logits of each last token
    attention = 4 * 2 * 4 * 64 * 8 * 128 * 128
    assert row["tflops"] * 1e12 * 8 == pytest.approx(products + attention, rel=0.15)
    caches = sizes.outputs(prefill, compiled, mesh)
    assert jax.tree.leaves(caches.cache)[0].sharding.mesh == mesh


@needs_libtpu
@pytest.mark.parametrize("name", chips.CHIPS)
def test_every_known_chip_is_one_device(name):
    layout = "x".join("2" * len(chips.CHIPS[name].pod))
    assert len(chips.topology(f"{name}:{layout}")[1]) == 2 ** len(chips.CHIPS[name].pod)


@needs_libtpu
def test_moments_in_host_memory_leave_the_chip():
    chip, devices = chips.topology("v5e:2x4")
    config = quickstart.get_config()
    config.sft.update(prompts=8, chains=1)
    rows = []
    for config.sft_optimizer.offload in (False, True):
        settings, mesh = make_settings(config), make_mesh(MeshConfig(fsdp=8), devices)
        model = dataclasses.replace(MODEL, hidden_size=1024, intermediate_size=4096, num_layers=4)
        program = programs.sft_program(settings, model, mesh)
        rows.append(plan_lib.measure(program, chip=chip, say=lambda line: None)[0])
    moments = 2 * device_bytes(program.args[1].policy.params) / 2**30
    assert rows[0]["argument_gib"] - rows[1]["argument_gib"] == pytest.approx(moments, rel=1e-3)
    # Taken a parameter at a time: what is saved is not spent on fetching all of them.
    assert rows[0]["hbm_gib"] - rows[1]["hbm_gib"] > moments / 2


@needs_libtpu
def test_the_command_refuses_in_one_line_and_keeps_stdout_clean():
    command = [sys.executable, "-m", "experiments.plan", "--config=configs/quickstart.py", "--json"]
    run = subprocess.run([*command, "--topology=v5e:3x5"], capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: --topology=v5e:3x5:") and len(run.stderr.splitlines()) == 1
    json.loads(json.dumps(plan_of(ROW)))


def test_what_a_plan_leaves_to_us_is_chosen_for_its_chip(monkeypatch):
    """A chip with room for half of the temporaries takes more micro-batches, and the plan says so."""
    chip = [chips.CHIPS["v5e"]]
    monkeypatch.setattr(plan_lib, "topology", lambda name: (chip[0], jax.devices()[:1]))
    config = quickstart.get_config("tiny")
    config.mesh.fsdp, config.align.steps = 1, 0
    config.sft.update(steps=8, prompts=8, chains=1, microbatches="auto")
    plan = plan_lib.make_plan(config, "here")
    assert plan["chosen"] == {"sft.microbatches": 1, "start.attention": "auto"}
    (whole,) = plan["programs"]
    room = whole["argument_gib"] + whole["temporary_gib"] / 2
    chip[0] = dataclasses.replace(chip[0], hbm=room * 2**30)
    plan = plan_lib.make_plan(config, "here")
    assert plan["chosen"]["sft.microbatches"] > 1 and plan["fits"]
    assert f"chosen: sft.microbatches={plan['chosen']['sft.microbatches']}" in format_plan(plan)
