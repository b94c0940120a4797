"""What each kind of rematerialisation makes again, read from the compiled programs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gtalign_jax.models import transformer
from gtalign_jax.models.config import REMAT, ModelConfig, RuntimeConfig
from gtalign_jax.planning import cost, hlo

ROWS, TIME, LAYERS = 2, 16, 3
MODEL = ModelConfig(
    vocab_size=32, hidden_size=16, intermediate_size=48, num_layers=LAYERS, num_heads=4, num_kv_heads=2,
    head_dim=8, qkv_bias=False,
)  # fmt: skip


def gradient_flops(remat, scan_layers):
    """Matrix operations of a gradient."""
    model = dataclasses.replace(MODEL, runtime=RuntimeConfig(remat=remat, scan_layers=scan_layers))

    def loss(params, tokens, length):
        return jnp.sum(transformer.forward(params, model, tokens, length) ** 2)

    params = jax.eval_shape(lambda: transformer.init_params(jax.random.key(0), model))
    array = jax.ShapeDtypeStruct
    arguments = array((ROWS, TIME), jnp.int32), array((ROWS,), jnp.int32)
    return cost.flops(hlo.parse(jax.jit(jax.grad(loss)).lower(params, *arguments).compile().as_text()))


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_each_kind_makes_again_what_it_does_not_keep(scan_layers):
    """dots: attention and the output projection, whose results the norm after them reads; full: all but
    the last product of a layer, which nothing reads."""
    none, dots, full = (gradient_flops(remat, scan_layers) for remat in REMAT)
    attention = 2 * 2 * 4 * 8 * ROWS * TIME**2
    output = 2 * 4 * 8 * 16 * ROWS * TIME
    kept = 2 * (16 * (4 + 2 + 2) * 8 + 2 * 16 * 48) * ROWS * TIME
    assert dots - none == LAYERS * (attention + output)
    assert full - dots == LAYERS * kept
