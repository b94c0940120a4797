"""Rotary position embedding and its context extensions (linear, Llama 3, YaRN arXiv 2309.00071)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gtalign_jax.errors import UserError, positive

_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """theta, and the kind of scaling with its numbers as sorted (name, value) pairs."""

    theta: float = 10000.0
    kind: str = "default"
    scaling: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        positive(self, "theta")

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], where: str) -> RopeConfig:
        """Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
        nested = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
        theta = nested.pop("rope_theta", None) or fields.get("rope_theta") or 10000.0
        kind = nested.pop("rope_type", None) or nested.pop("type", None) or "default"
        nested.pop("type", None)
        if kind not in _FIELDS:
            raise UserError(f"{where}: rope_type {kind!r} is not supported; use one of {', '.join(_FIELDS)}")
        unknown = sorted(set(nested) - _FIELDS[kind])
        if unknown:
            raise UserError(f"{where}: rope field {unknown[0]!r} is not understood for {kind!r}")
        if kind == "yarn":
            nested.setdefault("original_max_position_embeddings", fields.get("max_position_embeddings"))
        values = tuple(sorted((k, v) for k, v in nested.items() if v is not None))
        return cls(theta=float(theta), kind=kind, scaling=values)

    def to_hf(self) -> dict[str, Any]:
        return {"rope_parameters": {"rope_theta": self.theta, "rope_type": self.kind, **dict(self.scaling)}}


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """(inverse wavelengths [H/2] float32, factor on cos and sin)."""
    inv = 1.0 / config.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    s = dict(config.scaling)
    if config.kind == "linear":
        return (inv / s["factor"]).astype(np.float32), 1.0
    if config.kind == "llama3":
        return _llama3(inv, s).astype(np.float32), 1.0
    if config.kind == "yarn":
        return _yarn(inv, s, config.theta, head_dim).astype(np.float32), _yarn_attention_factor(s)
    return inv.astype(np.float32), 1.0


def _llama3(inv: np.ndarray, s: Mapping[str, float]) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between are blended."""
    low, high, original = (
        s["low_freq_factor"],
        s["high_freq_factor"],
        s["original_max_position_embeddings"],
    )
    blend = np.clip((original * inv / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * inv / s["factor"] + blend * inv


def _yarn(inv: np.ndarray, s: Mapping[str, float], theta: float, head_dim: int) -> np.ndarray:
    def dimension(rotations: float) -> float:
        ratio = s["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(theta))

    low, high = dimension(s.get("beta_fast", 32.0)), dimension(s.get("beta_slow", 1.0))
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return inv / s["factor"] * ramp + inv * (1 - ramp)


def _yarn_attention_factor(s: Mapping[str, float]) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(s["factor"]) + 1.0 if s["factor"] > 1 else 1.0

    if "attention_factor" in s:
        return s["attention_factor"]
    if s.get("mscale") and s.get("mscale_all_dim"):
        return mscale(s["mscale"]) / mscale(s["mscale_all_dim"])
    return mscale(1.0)


def rope_tables(config: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos, sin [..., T, H/2] float32 for integer positions [..., T]."""
    inv, factor = inverse_frequencies(config, head_dim)
    angles = positions[..., None].astype(jnp.float32) * inv
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate x [..., T, heads, H] by tables [..., T, H/2]; the halves are the two coordinates."""
    cos, sin = (table[..., None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
