"""A group's attention as one call of Pallas splash attention, the TPU's fused kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import Mask

from gtalign_jax.types import Array

TILE = 128  # what the kernel's lengths and head width are multiples of
_BLOCKS = (512, 256, TILE)


def attend_group(
    query: Array,
    k: Array,
    v: Array,
    prompt_k: Array | None = None,
    prompt_v: Array | None = None,
    length: Array | None = None,
    *,
    interpret: bool = False,
) -> Array:
    """Causal attention of query [P, G, N, Q, H] over own k, v [P, G, N, K, H], after prompts of `length` [P].

    prompt_k, prompt_v [P, S, K, H], of which the slots below length are seen. Everything on one device.
    Returns [P, G, N, Q, H] in the query's dtype.
    """
    p, g, n, heads, _ = query.shape
    if prompt_k is None:  # rows without a prompt have nothing in common
        query, k, v = (x.reshape(p * g, 1, *x.shape[2:]) for x in (query, k, v))
        slots, samples = 0, 1
    else:
        slots, samples = prompt_k.shape[1], g
    # [P, heads, slots of all samples, H], slots in the padded length of the kernel.
    scaled = query * query.shape[-1] ** -0.5
    q, k, v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (scaled, k, v))
    seen = None
    if slots:
        assert prompt_k is not None and prompt_v is not None and length is not None  # a prompt is all three
        k, v = (jnp.concatenate(pair, axis=1) for pair in ((prompt_k, k), (prompt_v, v)))
        real = (jnp.arange(k.shape[1]) >= slots) | (jnp.arange(k.shape[1]) < length[:, None])
        seen = _padded(real.astype(jnp.int32))
    q, k, v = (_padded(x).swapaxes(1, 2) for x in (q, k, v))
    segments = None
    if seen is not None:  # spare queries see the prompt, so that no row of the kernel is empty
        segments = splash.SegmentIds(jnp.ones((p, q.shape[2]), jnp.int32), seen)
    mask = GroupMask((q.shape[2], k.shape[2]), slots, samples, n)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads), block_sizes=_block_sizes(*mask.size), interpret=interpret
    )
    out = jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)
    return out[:, : samples * n].reshape(p, g, n, heads, -1)


def _padded(x: Array) -> Array:
    """x [P, L, ...] with zeros up to a multiple of TILE."""
    return jnp.pad(x, [(0, -x.shape[1] % TILE if axis == 1 else 0) for axis in range(x.ndim)])


def _block_sizes(queries: int, keys: int) -> splash.BlockSizes:
    q, kv = (next(block for block in _BLOCKS if length % block == 0) for length in (queries, keys))
    return splash.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv, block_q_dkv=q, block_kv_dkv=kv,
        block_kv_dkv_compute=kv, block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GroupMask(Mask):
    """Who sees whom in a group, evaluated a block at a time.

    size: padded (queries, keys). Query i is token i % tokens of sample i // tokens. Key j is a prompt slot
    below `slots`, which all see, and from there on a token, seen by the later ones of its sample.
    Spare queries see the prompt or the last sample, spare keys are seen by nobody real.
    """

    size: tuple[int, int]
    slots: int
    samples: int
    tokens: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        query, key = (np.arange(size)[part] for size, part in zip(self.size, index, strict=True))
        own = (key - self.slots)[None]
        query = query[:, None]
        same = own // self.tokens == query // self.tokens
        return (own < 0) | (same & (own <= query))
