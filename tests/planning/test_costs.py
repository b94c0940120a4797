"""Costs read from compiled programs, against closed forms, XLA's own counts and loops written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gtalign_jax.mesh.sharding import MeshConfig, make_mesh
from gtalign_jax.planning import cost, hlo
from gtalign_jax.planning.chips import CHIPS, seconds_on_wire
from gtalign_jax.planning.cost import Collective

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
    assert 3 * LAYERS * 3 * N * N * 4 <= cost.traffic(module) <= 3 * LAYERS * 9 * N * N * 4


def test_a_program_without_loops_costs_what_xla_says():
    program = compiled(lambda a, b, c: jnp.sin(a @ b) @ c, (48, 32), (32, 80), (80, 16))
    module = hlo.parse(program.as_text())
    products = 2 * 48 * 32 * 80 + 2 * 48 * 80 * 16
    assert cost.flops(module) == products
    assert cost.flops(module) == pytest.approx(program.cost_analysis()["flops"], rel=0.05)
    assert cost.traffic(module) == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.2)


def test_a_loop_of_unknown_length_takes_the_callers_number():
    def count(x, until):
        return jax.lax.while_loop(lambda c: c[0] < until, lambda c: (c[0] + 1, c[1] @ c[1]), (0.0, x))

    text = compiled(count, (N, N), ()).as_text()
    assert cost.flops(hlo.parse(text, 7)) == 7 * cost.flops(hlo.parse(text, 1)) == 7 * 2 * N**3


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
    assert cost.traffic(hlo.parse(text)) == 2 * (2 * 8 * 16) + 2 * 4 * 1024
