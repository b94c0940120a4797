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
from gtalign_jax.models.fields import choice, nested, number, truth, warn_of_metadata

# Kind → the fields that it must have, and those that it may have.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
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
        """Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before).

        Fields that the kind does not have are metadata, and named in a warning.
        """
        given = nested(fields, "rope_scaling", where) or nested(fields, "rope_parameters", where)
        where = f"{where}: rope"
        if any(isinstance(value, dict) for value in given.values()):
            raise UserError(f"{where}: parameters for each type of layer are not supported")
        theta = number(given if given.get("rope_theta") is not None else fields, "rope_theta", where, 10000.0)
        kind = choice(given, "rope_type", where, _FIELDS, None) or choice(
            given, "type", where, _FIELDS, "default"
        )
        if kind == "yarn":
            given = {"original_max_position_embeddings": fields.get("max_position_embeddings"), **given}
        must, may = _FIELDS[kind]
        scaling = {name: number(given, name, f"{where} {kind}") for name in must}
        for name in may:
            if name == "truncate" and given.get(name) is not None:
                scaling[name] = truth(given, name, where, True)
            elif given.get(name) or (name == "attention_factor" and given.get(name) is not None):
                scaling[name] = number(given, name, where)
        if given.get("partial_rotary_factor") not in (None, 1.0):
            raise UserError(
                f"{where}: field 'partial_rotary_factor' changes the numbers and is not supported"
            )
        known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", *must, *may}
        warn_of_metadata(set(given) - known, where)
        return cls(theta=theta, kind=kind, scaling=tuple(sorted(scaling.items())))

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
