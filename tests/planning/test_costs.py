"""Costs read from compiled programs, against closed forms, XLA's own counts and loops written out."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gtalign_jax.mesh.sharding import MeshConfig, make_mesh
from gtalign_jax.models import transformer
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.models.products import project
from gtalign_jax.planning import chips, cost, hlo, programs
from gtalign_jax.planning.chips import CHIPS, seconds_on_wire, seconds_on_wires
from gtalign_jax.planning.cost import Collective
from gtalign_jax.planning.traffic import traffic

N, LAYERS = 64, 5


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()


def test_products_in_loops_are_counted_as_often_as_they_run():
    def layers(x, weights):
        def outer(x, _):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    module = hlo.parse(compiled(layers, (N, N), (LAYERS, N, N)).as_text())
    assert cost.flops(module) == 3 * LAYERS * 2 * N**3
    # Each product reads the running value and one layer's weights at least, and writes the value.
    assert 3 * LAYERS * 3 * N * N * 4 <= traffic(module) <= 3 * LAYERS * 9 * N * N * 4


def test_a_program_without_loops_costs_what_xla_says():
    program = compiled(lambda a, b, c: jnp.sin(a @ b) @ c, (48, 32), (32, 80), (80, 16))
    module = hlo.parse(program.as_text())
    products = 2 * 48 * 32 * 80 + 2 * 48 * 80 * 16
    assert cost.flops(module) == products
    assert cost.flops(module) == pytest.approx(program.cost_analysis()["flops"], rel=0.05)
    assert traffic(module) == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.2)


def test_a_loop_of_unknown_length_takes_the_callers_number():
    def count(x, until):
        return jax.lax.while_loop(lambda c: c[0] < until, lambda c: (c[0] + 1, c[1] @ c[1]), (0.0, x))

    text = compiled(count, (N, N), ()).as_text()
    assert cost.flops(hlo.parse(text, 7)) == 7 * cost.flops(hlo.parse(text, 1)) == 7 * 2 * N**3


@pytest.mark.parametrize(
    ("start", "bound", "step", "turns"), [(0, 4, 1, 4), (0, 4, 2, 2), (1, 8, 3, 3), (5, 5, 1, 0)]
)
def test_a_loop_runs_as_often_as_its_counter_says(start, bound, step, turns):
    """As TPU programs write the loops of a split product: by two, the counter anywhere in the tuple."""
    text = f"""HloModule m

%body (p: (f32[8,8], s32[])) -> (f32[8,8], s32[]) {{
  %p = (f32[8,8]{{1,0}}, s32[]) parameter(0)
  %x = f32[8,8]{{1,0}} get-tuple-element(%p), index=0
  %y = f32[8,8]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %i = s32[] get-tuple-element(%p), index=1
  %i.copy = s32[] copy(%i)
  %step = s32[] constant({step})
  %next = s32[] add(%i.copy, %step)
  ROOT %t = (f32[8,8]{{1,0}}, s32[]) tuple(%y, %next)
}}

%condition (p: (f32[8,8], s32[])) -> pred[] {{
  %p = (f32[8,8]{{1,0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=1
  %bound = s32[] constant({bound})
  ROOT %c = pred[] compare(%i, %bound), direction=LT
}}

ENTRY %main (a: f32[8,8]) -> (f32[8,8], s32[]) {{
  %a = f32[8,8]{{1,0}} parameter(0)
  %zero = s32[] constant({start})
  %start = s32[] copy(%zero)
  %t = (f32[8,8]{{1,0}}, s32[]) tuple(%a, %start)
  ROOT %w = (f32[8,8]{{1,0}}, s32[]) while(%t), condition=%condition, body=%body
}}
"""
    assert cost.flops(hlo.parse(text, 100)) == turns * 2 * 8**3
    by_the_data = text.replace("add(%i.copy, %step)", "multiply(%i.copy, %step)")
    assert cost.flops(hlo.parse(by_the_data, 100)) == 100 * 2 * 8**3


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pad", "base", "dilation"),
    [(8, 1, 1, 0, 1, 1), (8, 8, 1, 7, 1, 1), (6, 2, 1, 0, 2, 1), (9, 3, 2, 1, 1, 2), (5, 4, 3, 2, 3, 2)],
)
def test_taps_on_padding_do_no_work(size, kernel, stride, pad, base, dilation):
    width = (size - 1) * base + 1
    out = (width + 2 * pad - (kernel - 1) * dilation - 1) // stride + 1
    real = [False] * pad + [i % base == 0 for i in range(width)] + [False] * pad
    expected = sum(real[o * stride + k * dilation] for o in range(out) for k in range(kernel))
    assert cost._taps(size, kernel, out, stride, pad, base, dilation) == expected


def test_a_product_written_as_a_convolution_costs_the_product():
    # As TPU programs write [rows, 24] x [24, heads, 16] and a product batched over 3 groups.
    text = """HloModule m

ENTRY %main (a: bf16[40,1,24], b: bf16[24,4,16], c: bf16[3,8,10], d: bf16[3,10,6]) -> bf16[40,4,16] {
  %a = bf16[40,1,24]{2,1,0} parameter(0)
  %b = bf16[24,4,16]{2,1,0} parameter(1)
  %c = bf16[3,8,10]{2,1,0} parameter(2)
  %d = bf16[3,10,6]{2,1,0} parameter(3)
  %y = bf16[3,8,6]{2,1,0} convolution(%c, %d), BATCHED
  ROOT %x = bf16[40,4,16]{2,1,0} convolution(%a, %b), HEADS
}
"""
    text = text.replace("HEADS", "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=b0f_i0o->b0f")
    batched = "window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf"
    text = text.replace("BATCHED", batched)
    assert cost.flops(hlo.parse(text)) == 2 * 40 * 24 * 4 * 16 + 2 * 3 * 8 * 10 * 6


def test_collectives_have_their_volume_group_and_number():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    split, rows = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P("fsdp"))

    def layers(x, weights):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    x = jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=rows)
    weights = jax.ShapeDtypeStruct((LAYERS, N, N), jnp.float32, sharding=split)
    with jax.set_mesh(mesh):
        text = jax.jit(layers).lower(x, weights).compile().as_text()
    found = cost.collectives(hlo.parse(text))
    gathers = [c for c in found if c.kind == "all-gather"]
    assert [(c.group, c.times, c.bytes) for c in gathers] == [(4, LAYERS, N * N * 4)]
    sums = [c for c in found if c.kind == "all-reduce"]
    assert [(c.group, c.times, c.bytes) for c in sums] == [(4, 1, 4)]


def test_permutes_in_opposite_directions_pass_at_the_same_time():
    """Their links are separate; those in one direction, and other collectives, wait for each other."""
    text = """HloModule m

ENTRY %main (a: f32[1000]) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  %b = f32[1000]{0} collective-permute(%a), channel_id=1, source_target_pairs=RIGHT
  %c = f32[1000]{0} collective-permute(%b), channel_id=2, source_target_pairs=LEFT
  %d = f32[1000]{0} collective-permute(%c), channel_id=3, source_target_pairs=RIGHT
  ROOT %e = f32[1000]{0} all-reduce(%d), channel_id=4, replica_groups={{0,2,4},{1,3,5}}, to_apply=%sum
}
"""
    text = text.replace("RIGHT", "{{0,2},{2,4},{4,0},{1,3},{3,5},{5,1}}")
    text = text.replace("LEFT", "{{0,4},{2,0},{4,2},{1,5},{3,1},{5,3}}")
    chip, found = CHIPS["v5e"], cost.collectives(hlo.parse(text))
    assert sorted(item.shift for item in found) == [-2, 0, 2, 2]
    one_way, reduction = 4000 / (chip.ring / 2), 2 * 2 / 3 * 4000 / chip.ring
    np.testing.assert_allclose(seconds_on_wires(found, chip), 2 * one_way + reduction)


@pytest.mark.parametrize(
    ("kind", "rounds"), [("all-gather", 15 / 16), ("reduce-scatter", 15 / 16), ("all-reduce", 2 * 15 / 16)]
)
def test_time_on_the_wire_is_that_of_a_ring(kind, rounds):
    chip = CHIPS["v5e"]
    item = Collective(kind, chip.ring, 16, 3, "", ())
    np.testing.assert_allclose(seconds_on_wire(item, chip), 3 * rounds)


def test_buffers_that_are_passed_on_and_on_chip_copies_are_not_counted_twice():
    # A product that carries a gather's buffers along, and a slice that is fetched into on-chip memory (S(1)).
    text = """HloModule m

%body (p0: bf16[8,16], p1: bf16[1024,1024]) -> (bf16[8,16], bf16[1024,1024]) {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = bf16[1024,1024]{1,0} parameter(1)
  %double = bf16[8,16]{1,0} add(%p0, %p0)
  ROOT %both = (bf16[8,16]{1,0}, bf16[1024,1024]{1,0}) tuple(%double, %p1)
}

ENTRY %main (a: bf16[8,16], b: bf16[1024,1024]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[1024,1024]{1,0} parameter(1)
  %f = (bf16[8,16]{1,0}, bf16[1024,1024]{1,0}) fusion(%a, %b), kind=kCustom, ALIAS, calls=%body
  %s = ((bf16[1024,1024]{1,0}), bf16[4,1024]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%b), slice={[0:4], [0:1024]}
  ROOT %g = bf16[8,16]{1,0} get-tuple-element(%f), index=0
}
""".replace("ALIAS", "output_to_operand_aliasing={{1}: (1, {})}")
    assert traffic(hlo.parse(text)) == 2 * (2 * 8 * 16) + 2 * 4 * 1024


NESTED = """HloModule m

%slice (p0: f32[64,1024], p1: s32[]) -> f32[1,1024] {
  %p0 = f32[64,1024]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,1024]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,1024}
}

%update (p0: f32[64,1024], p1: f32[1,1024], p2: s32[]) -> f32[64,1024] {
  %p0 = f32[64,1024]{1,0} parameter(0)
  %p1 = f32[1,1024]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = f32[64,1024]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

%whole (p0: f32[64,1024], p1: f32[64,1024], p2: s32[]) -> (f32[1,1024], f32[64,1024]) {
  %p0 = f32[64,1024]{1,0} parameter(0)
  %flat = f32[65536]{0} bitcast(%p0)
  %rows = f32[64,1024]{1,0} bitcast(%flat)
  %p1 = f32[64,1024]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %row = f32[1,1024]{1,0} fusion(%rows, %p2), kind=kLoop, calls=%slice
  %twice = f32[1,1024]{1,0} add(%row, %row)
  %new = f32[64,1024]{1,0} fusion(%p1, %twice, %p2), kind=kLoop, calls=%update
  ROOT %t = (f32[1,1024]{1,0}, f32[64,1024]{1,0}) tuple(%twice, %new)
}

ENTRY %main (a: f32[64,1024], b: f32[64,1024], i: s32[]) -> (f32[1,1024], f32[64,1024]) {
  %a = f32[64,1024]{1,0} parameter(0)
  %b = f32[64,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = (f32[1,1024]{1,0}, f32[64,1024]{1,0}) fusion(%a, %b, %i), kind=kLoop, calls=%whole
}
"""


COPIED = """%copied (p0: f32[65536]) -> f32[64,1024] {
  %p0 = f32[65536]{0} parameter(0)
  %b = f32[64,1024]{1,0} bitcast(%p0)
  ROOT %c = f32[64,1024]{0,1} copy(%b)
}

"""


def test_a_slice_inside_a_nested_fusion_moves_the_slice():
    row, index = 4 * 1024, 4
    # A row read, a row returned, a row written in place, and the index.
    assert traffic(hlo.parse(NESTED)) == 3 * row + index
    # A copy of all before the slice makes only what the slice takes.
    copied = NESTED.replace("{1,0} bitcast(%flat)", "{1,0} fusion(%flat), calls=%copied")
    copied = copied.replace("%whole (", COPIED + "%whole (", 1)
    assert traffic(hlo.parse(copied)) == 3 * row + index
    # Used whole beside the slice, it is read whole.
    beside = NESTED.replace(
        "%twice = f32[1,1024]{1,0} add(%row, %row)", "%twice = f32[1,1024]{1,0} add(%row, %p0)"
    )
    assert traffic(hlo.parse(beside)) == 64 * row + 2 * row + index


def flops_of(function, *arguments, mesh):
    """Matrix operations on all devices together, and the program."""
    with jax.set_mesh(mesh):
        text = jax.jit(function).lower(*arguments).compile().as_text()
    return mesh.size * cost.flops(hlo.parse(text)), text


def test_layers_cost_two_operations_a_weight_and_token_forward_and_four_backward():
    rows, time = 8, 16
    model = ModelConfig(
        vocab_size=32, hidden_size=16, intermediate_size=48, num_layers=LAYERS, num_heads=4, num_kv_heads=2,
        head_dim=8, qkv_bias=False,
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    params = programs.abstract_params(model, mesh)
    array = jax.ShapeDtypeStruct
    batch = programs.by_prompt((array((rows, time), jnp.int32), array((rows,), jnp.int32)), mesh)

    def forward(params, tokens, length):
        return jnp.sum(transformer.forward(params, model, tokens, length) ** 2)

    weights = LAYERS * (16 * (2 * 4 + 2 * 2) * 8 + 3 * 16 * 48)
    attention = 4 * LAYERS * 4 * 8 * rows * time**2
    expected = 2 * weights * rows * time + attention
    assert flops_of(forward, params, *batch, mesh=mesh)[0] == expected
    assert flops_of(jax.grad(forward), params, *batch, mesh=mesh)[0] == 3 * expected


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install libtpu"
)
def test_a_product_on_tpus_costs_the_same_however_the_compiler_cuts_it():
    """Here into a loop by two over the parts of the weights, which pass from chip to chip meanwhile."""
    _, devices = chips.topology("v5e:4x4")
    mesh = make_mesh(MeshConfig(fsdp=8, tensor=2), devices)
    rows, time, width, inner = 256, 2048, 2048, 11008

    def array(shape, *names):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*names)))

    x, kernel = array((rows, time, width), "fsdp"), array((width, inner), "fsdp", "tensor")
    dy = array((rows, time, inner), "fsdp", None, "tensor")
    forward, text = flops_of(project, x, kernel, mesh=mesh)
    assert " while(" in text and forward == 2 * width * inner * rows * time
    backward, _ = flops_of(lambda x, w, dy: jax.vjp(project, x, w)[1](dy), x, kernel, dy, mesh=mesh)
    assert backward == 2 * forward
